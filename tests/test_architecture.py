"""What may import what, and where versions may be told apart."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "lsg_patch"
FILES = sorted(ROOT.rglob("*.py"))

# what each room must not know, from the bottom up
FORBIDDEN = {
    "attention": (
        "transformers",
        "families",
        "modules",
        "config",
        "compat",
        "undo",
        "plan",
        "patching",
    ),
    "families": ("transformers", "attention", "modules", "plan", "patching"),
    "modules": ("transformers", "plan", "patching", "tokenizer"),
    "plan.py": ("patching", "cli", "demo"),
    "patching.py": ("cli", "demo", "memory"),
    "undo.py": ("transformers", "families", "modules", "attention", "config"),
}


def imported(file: Path) -> set[str]:
    """Top names of what a file imports; rooms of lsg_patch by their own names."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("lsg_patch.").split(".")[0] for name in found}


@pytest.mark.parametrize("room", FORBIDDEN)
def test_imports_run_downwards(room: str) -> None:
    files = [file for file in FILES if file.relative_to(ROOT).parts[0] == room]
    assert files
    for file in files:
        assert not imported(file) & set(FORBIDDEN[room]), file


def test_attention_needs_torch_alone() -> None:
    import sys

    for file in (ROOT / "attention").rglob("*.py"):
        others = imported(file) - set(sys.stdlib_module_names) - {"torch", "attention"}
        assert not others, (file, others)


def test_versions_are_told_apart_in_compat_alone() -> None:
    pattern = re.compile(r"transformers\.__version__|version\.parse|Version\(|torch\.__version__")
    for file in FILES:
        if file.name != "compat.py":
            assert not pattern.search(file.read_text(encoding="utf-8")), file
