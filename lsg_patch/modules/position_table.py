"""Position tables of another length, in place and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lsg_patch.undo import Journal


def tiled(rows: Tensor, offset: int, length: int) -> Tensor:
    """``rows`` (offset + n, width) as (offset + length, width): the first kept, the n repeated.

    Source: the reference's conversion, with all rows for every length.
    """
    head, body = rows[:offset], rows[offset:]
    copies = -(-length // len(body))
    return torch.cat([head, body.repeat(copies, 1)[:length]])


def interpolated(rows: Tensor, offset: int, length: int) -> Tensor:
    """``rows`` (offset + n, width) as (offset + length, width): the first kept, the n stretched.

    The new position p is the old one p * (n - 1) / (length - 1), linearly between two rows: both
    ends stay where they are. Up to n positions nothing is stretched: the first ``length`` are kept.
    """
    head, body = rows[:offset], rows[offset:]
    last = len(body) - 1
    span = max(last, length - 1, 1)
    # whole numbers, so that a position that falls on an old one is that row exactly
    scaled = torch.arange(length, device=rows.device) * last
    below = scaled // span
    wide = body.to(torch.promote_types(rows.dtype, torch.float32))
    part = ((scaled % span).to(wide.dtype) / span)[:, None]
    between = torch.lerp(wide[below], wide[(below + 1).clamp(max=last)], part)
    return torch.cat([head, between.to(rows.dtype)])


# LSGConfig.positions -> the table of another length
RESIZED = {"tile": tiled, "interpolate": interpolated}


def resize_positions(
    table: nn.Embedding, rows: Tensor, journal: Journal, stretched: bool = False
) -> None:
    """Give ``table`` the ``rows`` (n, width) in place of its own, the first of which they begin with.

    ``stretched``: they begin with others.
    """
    old = cast("nn.Parameter", table.weight)
    journal.record(PositionsResized(table, old, stretched))
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
    """The old table comes back as the same parameter, moved and cast as the new one was.

    Its rows are the first ones of the new table, so a table that was trained while it was long comes
    back trained; rows that the new table lacked are the old ones. What stretched rows learned
    belongs to no old row: then the old ones are what they were.
    """

    table: nn.Embedding
    old: nn.Parameter
    stretched: bool

    def undo(self) -> None:
        new, old = self.table.weight, self.old
        kept = new.detach()[: 0 if self.stretched else len(old)]
        old.data = torch.cat([kept, old.detach()[len(kept) :].to(new)])
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
