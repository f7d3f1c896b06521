"""What must be installed: the one place where version numbers are compared.

It is read before torch is, and by any Python 3: what is missing or too old is said in words.
"""

from __future__ import annotations

import re
import sys
import warnings
from importlib import metadata, util

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
        this = _dotted(tuple(sys.version_info[:3]))
        raise ImportError(f"lsg_patch needs Python {_dotted(PYTHON)} or later; this is {this}")
    for name, floor in FLOORS.items():
        mend = f"pip install '{name}>={_dotted(floor)}'"
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            if util.find_spec(name) is not None:
                continue  # a source tree says nothing of its version
            message = f"lsg_patch needs {name}, which is not installed: {mend}"
            raise ModuleNotFoundError(message, name=name) from None
        release = tuple(map(int, re.findall(r"\d+", version)[:2]))  # (5, 24) of 5.24.0.dev0
        if release < floor:
            raise ImportError(
                f"lsg_patch needs {name} {_dotted(floor)} or later; {version} is installed: {mend}"
            )
        if name == "transformers" and release > NEWEST:
            warnings.warn(
                f"lsg_patch was tested with transformers {_dotted(floor)} to {_dotted(NEWEST)}; "
                f"{version} is installed: it works if it can",
                stacklevel=3,  # the line that imports lsg_patch
            )


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
