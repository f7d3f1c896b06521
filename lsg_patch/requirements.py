"""What must be installed: the one place where version numbers are compared.

It is read before torch is, and by any Python 3: what is missing or too old is said in words.
"""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from importlib import metadata

PYTHON = (3, 10)
# pyproject.toml says the same
FLOORS = {"torch": (2, 1), "transformers": (4, 18)}
# the newest transformers of tox.ini
NEWEST = (5, 23)


def check() -> None:
    """See that Python, torch and transformers are there and new enough.

    Raises:
        ImportError: one is missing or too old; the message says what to install.

    Warns:
        UserWarning: transformers is newer than any that was tested.
    """
    if sys.version_info < PYTHON:
        raise ImportError(
            f"lsg_patch needs Python {_dotted(PYTHON)} or later; "
            f"this is {_dotted(tuple(sys.version_info[:3]))}"
        )
    versions = {name: _installed(name) for name in FLOORS}
    for name, floor in FLOORS.items():
        version, mend = versions[name], f"pip install '{name}>={_dotted(floor)}'"
        if version is None:
            message = f"lsg_patch needs {name}, which is not installed: {mend}"
            raise ModuleNotFoundError(message, name=name)
        if _release(version) < floor:
            raise ImportError(
                f"lsg_patch needs {name} {_dotted(floor)} or later; {version} is installed: {mend}"
            )
    if _release(versions["transformers"] or "") > NEWEST:
        warnings.warn(
            f"lsg_patch was tested with transformers {_dotted(FLOORS['transformers'])} to "
            f"{_dotted(NEWEST)}; {versions['transformers']} is installed: it works if it can",
            stacklevel=3,  # the line that imports lsg_patch
        )


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
    try:  # a source tree has no metadata
        return str(importlib.import_module(name).__version__)
    except ModuleNotFoundError as error:
        if error.name == name:
            return None
        raise


def _release(version: str) -> tuple[int, ...]:
    """(5, 24) of 5.24.0.dev0, (2, 13) of 2.13.0+cpu."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
