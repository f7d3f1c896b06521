"""What is supported, as a table made from the registry."""

from __future__ import annotations

import json
from typing import NamedTuple

from lsg_patch.families.base import learned
from lsg_patch.families.registry import FAMILIES


class Row(NamedTuple):
    """A family; ``positions`` is "learned", "rotary", "learned or" another kind, or "none"."""

    family: str
    base_models: tuple[str, ...]
    positions: str
    begins_with_cls: bool


def rows() -> list[Row]:
    """All families, by name."""
    found = []
    for name, family in sorted(FAMILIES.items()):
        kinds = ["learned"] * (family.positions is not None)
        kinds += ["rotary"] * (family.rotary is not None)
        kinds += ["computed"] * (family.rotary is None and family.computed_positions is not learned)
        positions = " or ".join(kinds) or "none"
        found.append(Row(name, family.base_classes, positions, family.begins_with_cls))
    return found


def as_json() -> str:
    """A list of objects with the fields of ``Row``."""
    return json.dumps([row._asdict() for row in rows()], indent=2)


def as_text() -> str:
    """Columns, their heads first."""
    lines = _cells()
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def as_markdown() -> str:
    """A Markdown table, as the README has it."""
    head, *others = _cells()
    lines = [head, ("---",) * len(head), *others]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells() -> list[tuple[str, ...]]:
    return [tuple(name.replace("_", " ") for name in Row._fields)] + [
        (row.family, ", ".join(row.base_models), row.positions, ("no", "yes")[row.begins_with_cls])
        for row in rows()
    ]
