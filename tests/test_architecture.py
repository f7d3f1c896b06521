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
    "hooking.py": ("patching", "cli", "demo"),
    "holders.py": ("transformers", "families", "modules", "plan", "patching"),
    "loading.py": ("transformers", "families", "modules", "plan", "patching"),
    "patching.py": ("checkpoints", "weights", "cli", "demo", "memory"),
    "chunking.py": ("transformers", "checkpoints", "cli", "demo", "memory"),
    "checkpoints.py": ("conversion", "cli", "demo", "memory"),
    "conversion.py": ("cli", "commands", "demo", "memory"),
    "costs.py": ("transformers", "checkpoints", "plots", "cli", "commands", "demo"),
    "exporting.py": ("transformers", "plots", "cli", "commands", "demo"),
    "tuning.py": ("transformers", "checkpoints", "plots", "cli", "commands", "demo"),
    "plots.py": ("transformers", "checkpoints", "cli", "commands", "demo"),
    "published.py": ("transformers", "checkpoints", "patching", "plan", "weights"),
    "inspection.py": ("transformers", "checkpoints", "patching", "plan", "weights"),
    "weights.py": ("transformers", "checkpoints", "patching", "plan", "cli", "demo"),
    "requirements.py": ("torch", "transformers", "compat"),
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


# numbers are compared in requirements.py; compat.py may, where nothing else tells
MAY_COMPARE_VERSIONS = {"compat.py", "requirements.py"}


def test_versions_are_told_apart_in_compat_alone() -> None:
    pattern = re.compile(
        r"transformers\.__version__|version\.parse|Version\(|torch\.__version__|version_info"
        r"|torch_version|is_torch_(greater|less)"
    )
    for file in FILES:
        if file.name not in MAY_COMPARE_VERSIONS:
            assert not pattern.search(file.read_text(encoding="utf-8")), file
            assert not compared_versions(file), file


def compared_versions(file: Path) -> list[str]:
    """Comparisons in which something is called a version."""
    compared = [
        node
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Compare)
    ]
    return [text for text in map(ast.unparse, compared) if "version" in text.lower()]


def test_a_comparison_of_versions_is_seen(tmp_path: Path) -> None:
    assert compared_versions(ROOT / "requirements.py")
    file = tmp_path / "new.py"
    file.write_text("if metadata.version('transformers') >= '5': pass", encoding="utf-8")
    assert compared_versions(file)
