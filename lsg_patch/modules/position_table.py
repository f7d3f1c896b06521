"""Position tables of another length, in place and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lsg_patch import offloading
from lsg_patch.undo import Change, Journal


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


def unlike_a_table(table: nn.Embedding) -> str | None:
    """What keeps ``table`` from getting other rows, and the mend, in words."""
    weight = vars(table)["_parameters"].get("weight")
    if weight is None:
        return (
            "its weight is computed from other tensors (pruning, weight norm, a parametrization): make it "
            "a parameter first (torch.nn.utils.prune.remove, torch.nn.utils.parametrize."
            "remove_parametrizations)"
        )
    if is_traceable_wrapper_subclass(weight) or weight.dim() != 2:
        return (
            f"its weight is a {type(weight).__name__} of shape {tuple(weight.shape)}, sharded or "
            "quantized: patch and revert plain models, and shard or quantize them after that"
        )
    return None


def resize_positions(
    tables: Sequence[nn.Embedding], rows: Tensor, journal: Journal, common: int
) -> None:
    """Give ``tables``, which share a weight, the ``rows`` (n, width), of which the first ``common``
    are theirs.
    """
    old = cast("nn.Parameter", tables[0].weight)
    keeper = offloading.keeper_of(tables[0]) if old.is_meta else None
    kept = None
    if keeper is not None:
        kept = offloading.value_of(tables[0])
        journal.of(tables[0]).set_attribute(keeper, "weights_map", keeper.weights_map)
        rows = offloading.keep(tables[0], "weight", rows)
    new = nn.Parameter(rows, requires_grad=old.requires_grad)
    for table in tables:
        journal.of(table).record(PositionsResized(table, old, common, keeper, kept))
        table.weight = new
        table.num_embeddings = len(new)


def resize_buffers(owner: nn.Module, names: tuple[str, ...], rows: int, journal: Journal) -> None:
    """Give the buffers (1, n) or (n,) of ``owner`` that exist ``rows`` entries: positions count up from
    their first, types are 0.
    """
    for name in names:
        old = getattr(owner, name, None)
        if isinstance(old, Tensor):
            journal.of(owner).record(BufferResized(owner, name, old))
            new = old.new_zeros(*old.shape[:-1], rows)
            if name == "position_ids":
                new += torch.arange(rows, dtype=old.dtype, device=old.device) + old[..., :1]
            setattr(owner, name, new)


@dataclass
class PositionsResized(Change):
    """The old table comes back as the same parameter, moved and cast as the new one was.

    Its first ``common`` rows are those of the new table, so a table that was trained while it was
    long comes back trained; all others are what they were. Stretched rows have none in common with
    the old ones. Where the table was offloaded, the
    hook ``keeper`` had the values ``kept``; if it has them no more, or another hook has, the
    parameter is a new one.
    """

    table: nn.Embedding
    old: nn.Parameter
    common: int
    keeper: Any
    kept: Tensor | None

    def hindrance(self) -> str | None:
        return unlike_a_table(self.table)

    def undo(self) -> None:
        table, old, new = self.table, self.old, self.table.weight
        values = offloading.value_of(table).detach()
        first = values[: min(self.common, len(old))]
        rest = (old.detach() if self.kept is None else self.kept)[len(first) :]
        rows = torch.cat([first, rest.to(values)])
        keeper = offloading.keeper_of(table) if new.is_meta else None
        if keeper is self.keeper and old.is_meta == new.is_meta:
            old.data = rows.to(new.device)
            old.requires_grad_(new.requires_grad)
        else:
            rows = rows if keeper is None else offloading.keep(table, "weight", rows)
            old = nn.Parameter(rows, requires_grad=new.requires_grad)
        table.weight = old
        table.num_embeddings = len(old)


@dataclass
class BufferResized(Change):
    owner: nn.Module
    name: str
    old: Tensor

    def undo(self) -> None:
        now = getattr(self.owner, self.name, self.old)
        setattr(self.owner, self.name, self.old.to(now.device))
