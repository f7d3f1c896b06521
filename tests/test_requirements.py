"""Importing lsg_patch where something is missing, too old, or newer than what was tested."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lsg_patch import requirements

ROOT = Path(__file__).parent.parent


def import_with(
    folder: Path, code: str = "import lsg_patch", isolated: bool = False, **versions: str
) -> subprocess.CompletedProcess[str]:
    """Import it where packages seem to be of these versions; isolated: where there are no others."""
    for name, version in versions.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (info / "METADATA").write_text(metadata, encoding="utf-8")
    paths = [str(folder), str(ROOT), *([] if isolated else sys.path)]
    return subprocess.run(
        [sys.executable, *(["-S"] if isolated else []), "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        cwd=folder,
    )


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({}, "lsg_patch needs torch, which is not installed: pip install 'torch>=2.1'"),
        (
            {"torch": "2.13.0+cpu"},
            "lsg_patch needs transformers, which is not installed: pip install 'transformers>=4.18'",
        ),
    ],
)
def test_what_is_missing_is_said(tmp_path: Path, there: dict[str, str], message: str) -> None:
    done = import_with(tmp_path, isolated=True, **there)
    assert done.stderr.splitlines()[-1] == f"ModuleNotFoundError: {message}"


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [
        ("torch", "2.0.1+cu118", "needs torch 2.1 or later; 2.0.1+cu118 is installed"),
        ("transformers", "4.17.0", "needs transformers 4.18 or later; 4.17.0 is installed"),
        ("transformers", "3.5", "needs transformers 4.18 or later; 3.5 is installed"),
    ],
)
def test_what_is_too_old_is_said(tmp_path: Path, name: str, version: str, message: str) -> None:
    done = import_with(tmp_path, **{name: version})
    assert f"ImportError: lsg_patch {message}" in done.stderr.splitlines()[-1]
    assert f"pip install '{name}>=" in done.stderr


def test_an_old_python_is_named(tmp_path: Path) -> None:
    done = import_with(tmp_path, "import sys; sys.version_info = (3, 9, 18); import lsg_patch")
    assert done.stderr.splitlines()[-1] == (
        "ImportError: lsg_patch needs Python 3.10 or later; this is 3.9.18"
    )
    # what runs before the check must be understood by it
    for file in ("__init__.py", "requirements.py"):
        source = (ROOT / "lsg_patch" / file).read_text(encoding="utf-8")
        ast.parse(source, feature_version=(3, 7))


@pytest.mark.parametrize("version", ["5.24.0.dev0", "6.0.0", "5.99.1"])
def test_a_newer_transformers_works_and_warns_once(tmp_path: Path, version: str) -> None:
    code = """
import lsg_patch
import lsg_patch.patching
import lsg_patch
print(lsg_patch.LSGConfig().block_size)
"""
    done = import_with(tmp_path, code, transformers=version)
    assert done.stdout == "128\n", done.stderr
    assert done.stderr.count("UserWarning") == 1
    assert "<string>:2: UserWarning: lsg_patch was tested with transformers 4.18 to 5.23; " in (
        done.stderr
    )
    assert version in done.stderr


@pytest.mark.parametrize("version", ["4.18.0", "4.40.2", "5.23.0", "5.23.9"])
def test_a_tested_one_is_no_news(tmp_path: Path, version: str) -> None:
    done = import_with(tmp_path, "import lsg_patch.requirements", transformers=version)
    assert (done.returncode, done.stderr) == (0, "")


def test_source_trees_without_metadata(tmp_path: Path) -> None:
    """They say nothing of their version, and are there all the same."""
    for name in ("torch", "transformers"):
        (tmp_path / f"{name}.py").touch()
    shutil.copytree(ROOT / "lsg_patch", tmp_path / "lsg_patch")
    done = import_with(tmp_path, isolated=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_package_reads_versions_before_torch() -> None:
    imported = {
        alias.name
        for node in ast.walk(ast.parse(Path(requirements.__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert imported <= set(sys.stdlib_module_names)
