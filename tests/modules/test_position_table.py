"""Position tables: always the rows asked for, and back."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lsg_patch.families.base import tiled
from lsg_patch.modules.position_table import resize_positions
from lsg_patch.undo import Journal


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
    journal = Journal()
    resize_positions(table, tiled(old.detach(), offset, length), journal)
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
