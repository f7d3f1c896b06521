"""`lsg-patch families`."""

from __future__ import annotations

import json

import pytest

from lsg_patch import cli
from lsg_patch.families import FAMILIES, table


def test_every_family_has_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["families"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert all(name.replace("_", " ") in head for name in table.Row._fields)
    assert [line.split()[0] for line in lines] == sorted(FAMILIES)
    for line in lines:
        family = FAMILIES[line.split()[0]]
        assert all(cls in line for cls in family.base_classes)
        assert line.endswith("yes" if family.begins_with_cls else "no")


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["families", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["family"]: tuple(row["base_models"]) for row in rows} == {
        name: family.base_classes for name, family in FAMILIES.items()
    }
    assert {row["family"]: row["positions"] for row in rows if row["positions"] != "learned"} == {
        "distilbert": "learned or computed",
        "esm": "learned or rotary",
        "pegasus": "learned or computed",
        "roformer": "rotary",
    }
