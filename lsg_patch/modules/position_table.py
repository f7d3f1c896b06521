"""Position tables of another length, in place and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lsg_patch.undo import Journal


def resize_positions(table: nn.Embedding, rows: Tensor, journal: Journal) -> None:
    """Give ``table`` the ``rows`` (n, width) in place of its own."""
    old = cast("nn.Parameter", table.weight)
    journal.record(PositionsResized(table, old))
    table.weight = nn.Parameter(rows, requires_grad=old.requires_grad)
    table.num_embeddings = len(rows)


def resize_buffers(owner: nn.Module, names: tuple[str, ...], rows: int, journal: Journal) -> None:
    """Give the (1, n) buffers of ``owner`` that exist ``rows`` entries: positions count up, types are 0."""
    for name in names:
        old = getattr(owner, name, None)
        if isinstance(old, Tensor):
            journal.record(BufferResized(owner, name, old))
            counted = torch.arange(rows, dtype=old.dtype, device=old.device).expand(1, -1)
            setattr(
                owner,
                name,
                counted.clone() if name == "position_ids" else torch.zeros_like(counted),
            )


@dataclass
class PositionsResized:
    """The old table comes back as the same parameter, with what became of its rows meanwhile.

    Its rows are the first ones of the new table, so a table that was trained, moved or cast while
    it was long comes back trained, moved and cast. Rows that the new table lacked are the old ones.
    """

    table: nn.Embedding
    old: nn.Parameter

    def undo(self) -> None:
        new, old = self.table.weight, self.old
        rows = new.detach()[: len(old)].clone()
        if len(rows) < len(old):
            rows = torch.cat([rows, old.detach()[len(rows) :].to(rows)])
        old.data = rows
        old.requires_grad_(new.requires_grad)
        self.table.weight = old
        self.table.num_embeddings = len(old)


@dataclass
class BufferResized:
    owner: nn.Module
    name: str
    old: Tensor

    def undo(self) -> None:
        setattr(self.owner, self.name, self.old.to(getattr(self.owner, self.name).device))
