"""The peer's tests: fetched from the source distribution of the transformers that is installed.

They are not stored here. The distribution has the mixins that all model tests are made of, but
nothing of single families, so ``cases`` says what a family's config and inputs are.
"""

from __future__ import annotations

import ast
import importlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import warnings
from pathlib import Path
from types import ModuleType

import transformers

PACKAGE = "transformers_suite"
COMMON, TRAINING = "test_modeling_common", "test_training_mixin"


class NoSuiteError(Exception):
    """The tests cannot be had; the message says why."""


def load(cache: Path) -> tuple[ModuleType, ModuleType | None]:
    """The modules of the common tests and of the training test (newer releases have it).

    Fetched once for a release, into a folder of ``cache``.

    Raises:
        NoSuiteError: there is no network, or this release has no such tests.
    """
    root = cache / f"transformers-{transformers.__version__}"
    if not root.exists():
        _fetch(root)
    sys.path.insert(0, str(root))
    has_training = (root / PACKAGE / f"{TRAINING}.py").exists()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # of marks that pytest knows in the peer's repository only
            common = importlib.import_module(f"{PACKAGE}.{COMMON}")
            training = importlib.import_module(f"{PACKAGE}.{TRAINING}") if has_training else None
    except ImportError as error:
        raise NoSuiteError(
            f"the tests of transformers {transformers.__version__} cannot be imported: {error} "
            "(pip install lsg-patch[peer])"
        ) from error
    return common, training


def _fetch(root: Path) -> None:
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
        package = Path(scratch) / "unpacked" / PACKAGE
        unpack(_download(Path(scratch)), package)
        for name in (COMMON, TRAINING):
            if (package / f"{name}.py").exists():
                _stand_in_for_missing(package, package / f"{name}.py")
        try:
            package.parent.rename(root)
        except OSError:
            # another worker was first
            if not root.exists():
                raise


def _download(folder: Path) -> Path:
    wanted = f"transformers=={transformers.__version__}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    done = subprocess.run(
        [*pip, "--no-binary", "transformers", wanted], capture_output=True, text=True
    )
    found = list(folder.glob("transformers-*.tar.gz"))
    if done.returncode or not found:
        why = (done.stderr.strip() or "pip gave no file").splitlines()[-1]
        raise NoSuiteError(f"the source distribution of {wanted} cannot be downloaded: {why}")
    return found[0]


def unpack(archive: Path, package: Path) -> None:
    """The tests at the top of a source distribution's folder of them, as ``package``."""
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    with tarfile.open(archive) as files:
        for member in files:
            path = Path(member.name)
            if path.parent.name == "tests" and path.suffix == ".py" and len(path.parts) == 3:
                content = files.extractfile(member)
                if content is not None:
                    with (package / path.name).open("wb") as target:
                        shutil.copyfileobj(content, target)
    if not (package / f"{COMMON}.py").exists():
        raise NoSuiteError(f"{archive.name} has no tests/{COMMON}.py")


def _stand_in_for_missing(package: Path, module: Path) -> None:
    """Empty classes for those of modules that the distribution leaves out (tests of generation)."""
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ImportFrom) or node.level != 1 or node.module is None:
            continue
        path = package.joinpath(*node.module.split(".")).with_suffix(".py")
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "".join(f"class {alias.name}:\n    pass\n" for alias in node.names), encoding="utf-8"
        )
