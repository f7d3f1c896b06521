"""What `import lsg_patch` loads, and when."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

import lsg_patch
from tests.typed.check import USER


def test_every_public_name_is_there() -> None:
    for name in lsg_patch.__all__:
        assert getattr(lsg_patch, name).__name__ == name
    assert set(lsg_patch.__all__) <= set(dir(lsg_patch))
    assert "patch_model" in lsg_patch.__all__


def test_types_are_checked_of_every_public_name() -> None:
    """By `tox -e release`, where the wheel is installed."""
    used = {
        node.attr
        for node in ast.walk(ast.parse(USER.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "lsg_patch"
    }
    assert used >= set(lsg_patch.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'patch_modle'"):
        _ = lsg_patch.patch_modle


@pytest.mark.parametrize("room", ["attention", "checkpoints", "config", "families", "patching"])
def test_rooms_are_attributes(room: str) -> None:
    code = f"import lsg_patch; assert lsg_patch.{room}.__name__ == 'lsg_patch.{room}'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_it_loads_neither_torch_nor_a_models_code() -> None:
    """So it takes next to no time beside `import transformers`; `tox -e bench -- small` has the time."""
    code = (
        "import sys, lsg_patch\n"
        "print(*(name for name in ('torch', 'transformers') if name in sys.modules))\n"
        "print(lsg_patch.patch_model.__module__, 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout.splitlines() == ["", "lsg_patch.patching True"]
