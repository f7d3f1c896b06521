"""Position tables: always the rows asked for, and back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lsg_patch
from lsg_patch import LSGConfig
from lsg_patch.config import POSITION_NAMES
from lsg_patch.modules.position_table import RESIZED, interpolated, resize_positions, tiled
from lsg_patch.undo import Journal
from tests import models, seq2seq
from tests.models import POSITIONS, ids_like, right_padded, run, tiny_model


@given(st.integers(1, 40), st.integers(0, 3), st.integers(1, 300))
def test_tiled_has_all_rows_for_every_length(positions: int, offset: int, length: int) -> None:
    rows = torch.arange(float(offset + positions))[:, None]
    table = tiled(rows, offset, length)[:, 0]
    assert len(table) == offset + length
    assert torch.equal(table[:offset], rows[:offset, 0])
    assert torch.equal(table[offset:], offset + torch.arange(length) % positions)


@given(st.integers(3, 20), st.integers(0, 2), st.integers(1, 50))
def test_undo_gives_the_same_parameter_with_what_became_of_its_rows(
    rows: int, offset: int, length: int
) -> None:
    table = nn.Embedding(rows, 2)
    old, values = table.weight, table.weight.detach().clone()
    old.requires_grad_(False)
    journal = Journal(table)
    journal.attach()
    resize_positions([table], tiled(old.detach(), offset, length), journal, rows)
    assert not table.weight.requires_grad
    assert table.num_embeddings == len(table.weight) == offset + length
    with torch.no_grad():
        table.weight.mul_(2)
    table.to(torch.float64)
    journal.undo()
    kept = min(rows, offset + length)
    assert table.weight is old
    assert table.num_embeddings == rows
    assert old.dtype == torch.float64
    assert torch.equal(old[:kept], values[:kept].double() * 2)
    assert torch.equal(old[kept:], values[kept:].double())


def test_every_setting_has_its_table() -> None:
    assert tuple(RESIZED) == POSITION_NAMES


@given(st.integers(1, 40), st.integers(0, 3), st.integers(1, 300))
def test_interpolated_is_linear_between_the_old_rows(n: int, offset: int, length: int) -> None:
    """The number of its position in each old row: then the table tells the old positions."""
    rows = torch.arange(-float(offset), n)[:, None]
    table = interpolated(rows, offset, length)[:, 0]
    assert torch.equal(table[:offset], rows[:offset, 0])
    if length <= n:  # nothing to stretch
        assert torch.equal(table[offset:], torch.arange(float(length)))
    else:
        expected = torch.linspace(0, n - 1, length, dtype=torch.float64)
        torch.testing.assert_close(table[offset:].double(), expected, rtol=0, atol=1e-5)


@given(st.integers(2, 20), st.integers(0, 2), st.integers(1, 9))
def test_old_rows_stay_where_new_positions_fall_on_them(n: int, offset: int, factor: int) -> None:
    rows = torch.randn(offset + n, 3, generator=torch.Generator().manual_seed(n))
    table = interpolated(rows, offset, (n - 1) * factor + 1)
    assert torch.equal(table[:offset], rows[:offset])
    assert torch.equal(table[offset::factor], rows[offset:])
    # in between, the values of an independent implementation
    channels = rows[offset:].T[None]
    expected = torch.nn.functional.interpolate(
        channels, len(table) - offset, mode="linear", align_corners=True
    )[0].T
    torch.testing.assert_close(table[offset:], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_interpolated_in_float32_at_least_and_given_back_as_it_came(dtype: torch.dtype) -> None:
    # the difference of two such rows is no float16
    rows = torch.tensor([[6e4, 1.0], [-6e4, 1.0 + 2**-7]], dtype=dtype)
    table = interpolated(rows, 0, 7)
    assert table.dtype == dtype and torch.isfinite(table).all()
    assert torch.equal(table, interpolated(rows.double(), 0, 7).to(dtype))
    assert torch.equal(table[[0, -1]], rows)


SETTINGS: dict[str, Any] = {
    "block_size": 8,
    "sparse_block_size": 8,
    "max_position_embeddings": 200,
    "positions": "interpolate",
}


def position_tables(model: Any, family: str) -> list[tuple[nn.Embedding, int]]:
    """The position tables of a base model, and how many rows stand before position 0."""
    known = lsg_patch.families.FAMILIES[family]
    paths = [f"{known.embeddings}.{known.positions}", known.decoder_positions]
    tables = [model.get_submodule(path) for path in paths if path]
    return [(table, known.position_offset(table)) for table in tables]


# families with rotary positions have no table of rows that are added to words
WITH_TABLES = [
    family
    for family in (*models.FAMILIES, *seq2seq.FAMILIES)
    if lsg_patch.families.FAMILIES[family].rotary is None
]


@pytest.mark.parametrize("family", WITH_TABLES)
def test_every_family(family: str) -> None:
    room: Any = models if family in models.FAMILIES else seq2seq
    model, mask = room.tiny_model(family), right_padded(150, 90)
    ids = ids_like(mask, family) if room is models else seq2seq.ids_like(mask)
    tables = position_tables(model, family)
    assert [offset for _, offset in tables] == {
        "bart": [2, 2],
        "mbart": [2, 2],
        "pegasus": [0, 0],
    }.get(family, [2 if "pad_token_id" in models.FAMILIES.get(family, ("", "", {}))[2] else 0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    old = [(table.weight, table.weight.detach().clone()) for table, _ in tables]
    tokens = []
    for positions in POSITION_NAMES:
        lsg_patch.patch_model(model, **{**SETTINGS, "positions": positions})
        tokens.append(lsg_patch.global_embeddings(model).detach().clone())
        for (table, offset), (_, rows) in zip(tables, old, strict=True):
            computed = family == "pegasus"
            make = tiled if positions == "tile" else interpolated
            assert len(table.weight) == table.num_embeddings == 200 + offset
            assert torch.equal(table.weight[: offset + 1], rows[: offset + 1])
            assert torch.equal(table.weight, make(rows, offset, 200)) != computed
            if computed:
                assert torch.equal(table.weight[:POSITIONS], rows)
        assert room.run(model, ids, mask)["last_hidden_state"].isfinite().all()
        lsg_patch.unpatch_model(model)
        for (table, _), (weight, rows) in zip(tables, old, strict=True):
            assert table.weight is weight and torch.equal(weight, rows)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], value) for name, value in before.items())
    # they are made of the model's own positions
    assert torch.equal(*tokens)


@pytest.mark.parametrize("cast", [lambda m: m, lambda m: m.half(), lambda m: m.double()])
@pytest.mark.parametrize(
    "again", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_stretched_rows_take_what_they_learned_with_them(cast: Any, again: Any) -> None:
    model = tiny_model("roberta").train()
    table = model.embeddings.position_embeddings
    table.weight.requires_grad_(False)
    expected = cast(copy.deepcopy(table)).weight
    lsg_patch.patch_model(model, **SETTINGS)
    with torch.no_grad():
        table.weight.mul_(2)
    table.weight.requires_grad_(True)
    model = lsg_patch.unpatch_model(cast(again(model)))
    weight = model.embeddings.position_embeddings.weight
    assert weight.dtype == expected.dtype and torch.equal(weight, expected)
    assert weight.requires_grad


def test_the_length_that_there_is_changes_nothing() -> None:
    """So a saved model that is loaded and patched again keeps its table."""
    model, mask = tiny_model("bert"), right_padded(16, 9)
    ids, rows = ids_like(mask, "bert"), model.embeddings.position_embeddings.weight.clone()
    expected = run(model, ids, mask)["last_hidden_state"]
    same = {**SETTINGS, "max_position_embeddings": POSITIONS}
    with lsg_patch.patched(model, **same):
        assert torch.equal(model.embeddings.position_embeddings.weight, rows)
        actual = run(model, ids, mask)["last_hidden_state"]
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)


def test_stretched_positions_are_not_those_of_the_original() -> None:
    """Short inputs too: this is what ``tile`` keeps and ``interpolate`` does not."""
    model, mask = tiny_model("bert"), right_padded(16)
    ids = ids_like(mask, "bert")
    expected = run(model, ids, mask)["last_hidden_state"]
    with lsg_patch.patched(model, **SETTINGS):
        assert (run(model, ids, mask)["last_hidden_state"] - expected).abs().max() > 1e-2


def test_the_setting_is_kept_and_checked() -> None:
    model = lsg_patch.patch_model(tiny_model("bert"), **SETTINGS)
    config = lsg_patch.get_config(model)
    assert config.positions == "interpolate"
    assert LSGConfig.from_dict(config.to_dict()) == config
    assert LSGConfig().positions == "tile"
    with pytest.raises(ValueError, match="positions must be one of tile, interpolate, not 'tiles'"):
        LSGConfig(positions="tiles")
