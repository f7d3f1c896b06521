"""LSG checkpoints of the reference, on every transformers: what it saved, and each of its families."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import golden, test_published
from tests.test_published import test_what_the_reference_saved

__all__ = ["test_what_the_reference_saved"]
FIRST = {entry["arch"]: entry for entry in reversed(golden.entries("model"))}


@pytest.mark.parametrize("family", FIRST)
def test_every_family(family: str, tmp_path: Path) -> None:
    test_published.test_every_family_and_head(FIRST[family], None, tmp_path)
