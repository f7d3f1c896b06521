"""The keys that each block sees, as views; and their gathering, a cache-sized piece at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lsg_patch.attention.bias import BlockBias
from lsg_patch.attention.blocks import Blocks
from lsg_patch.attention.geometry import Run, unfold_windows
from lsg_patch.attention.keys import additive


class Windows(NamedTuple):
    """What the blocks of a run see: global keys, sparse ones, and those of the tokens, in parts.

    All are views: the gathering is left to the one who uses them.

    Attributes:
        key, value: parts (B, H, blocks, size, D).
        seen: (B, 1 or H, blocks, 1, keys), True where a key is seen.
    """

    key: list[Tensor]
    value: list[Tensor]
    seen: Tensor

    @property
    def size(self) -> int:
        """Keys that a block sees."""
        return self.seen.shape[-1]


def windows(blocks: Blocks, run: Run) -> Windows:
    """What the blocks of ``run`` see."""
    global_keys, sparse, tokens = blocks.global_keys, blocks.sparse, blocks.tokens
    parts: list[list[Tensor]] = []
    for name in ("key", "value", "mask"):
        dim = 2
        found = [getattr(global_keys, name).unsqueeze(dim)]
        found[0] = found[0].expand(*found[0].shape[:dim], run.blocks, *found[0].shape[dim + 1 :])
        if sparse is not None and run.sparse:
            found += unfold_windows(getattr(sparse, name), run.sparse, run.blocks, dim, run.first)
        found += unfold_windows(getattr(tokens, name), (run.local,), run.blocks, dim, run.first)
        parts.append(found)
    key, value, masks = parts
    heads = max(m.shape[1] for m in masks)
    seen = torch.cat([m.expand(-1, heads, -1, -1) for m in masks], dim=-1)
    return Windows(key, value, seen.unsqueeze(-2))


def places(blocks: Blocks, run: Run) -> tuple[list[Tensor], BlockBias | None]:
    """How far the keys that a block sees stand behind its first query, and the bias of it.

    The places are in the parts of ``windows``, each (1 or B, 1 or H, 1 or blocks, size): what is
    the same for all blocks is there once.
    """
    bias, sparse, geometry = blocks.bias, blocks.sparse, blocks.geometry
    if bias is None:
        return [], None
    of_globals = bias.of_globals(blocks.global_keys.key.shape[2])
    device = of_globals.device
    block = torch.arange(run.first, run.first + run.blocks, device=device)[:, None]
    start = geometry.block_size * block
    found = [of_globals.unsqueeze(2) - start]
    if sparse is not None and sparse.positions is not None and run.sparse:
        at = unfold_windows(sparse.positions, run.sparse, run.blocks, 2, run.first)
        found += [x - start for x in at]
    elif sparse is not None:
        for window in run.sparse:
            index = torch.arange(window.start, window.start + window.size, device=device)
            found.append(geometry.run_positions(index)[None, None, None])
    token = torch.arange(run.local.start, run.local.start + run.local.size, device=device)
    return [*found, token[None, None, None]], bias.of_blocks(run.queries)


def causal(rows: int, columns: int, like: Tensor) -> Tensor:
    """What keeps queries from the keys after them in their own block, whose keys come last."""
    seen = torch.ones(rows, columns, dtype=torch.bool, device=like.device)
    return additive(seen.tril(columns - rows), like.dtype)


class Piece(NamedTuple):
    """Some blocks of some heads of one row of a batch: an index of (B, H, blocks, ...)."""

    row: int
    heads: slice
    blocks: slice

    def of(self, x: Tensor) -> Tensor:
        """Of ``x`` (1 or B, 1 or H, 1 or blocks, ...): what is shared by all is whole in each."""
        everything = slice(None)
        return x[
            self.row if x.shape[0] > 1 else 0,
            self.heads if x.shape[1] > 1 else everything,
            self.blocks if x.shape[2] > 1 else everything,
        ]


def pieces(batch: int, heads: int, blocks: int, most: int) -> Iterator[Piece]:
    """Pieces of (batch, heads, blocks) of about ``most`` blocks each, whole heads where they fit."""
    for row in range(batch):
        for some_heads in _shares(heads, max(1, most // blocks)):
            for some_blocks in _shares(blocks, most):
                yield Piece(row, some_heads, some_blocks)


def _shares(count: int, most: int) -> Iterator[slice]:
    """Shares of ``count`` of about ``most``, as equal as even ones can be: for two threads or more."""
    size = -(-count // -(-count // most))
    size += size % 2 if 1 < size < count else 0
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


class Buffer:
    """Memory that is used for one piece after the other: fresh pages cost more than a product."""

    def __init__(self, like: Tensor, dtype: torch.dtype | None = None) -> None:
        self._memory = like.new_empty(0, dtype=dtype)

    def of(self, *shape: int) -> Tensor:
        """Contiguous memory of ``shape``, its contents undefined."""
        size = 1
        for extent in shape:
            size *= extent
        if self._memory.numel() < size:
            self._memory = self._memory.new_empty(size)
        return self._memory[:size].view(shape)

    def gather(self, parts: Sequence[Tensor], piece: Piece) -> Tensor:
        """The ``parts`` (B, H, blocks, size, D) of a piece side by side: (heads, blocks, keys, D)."""
        found = [piece.of(x) for x in parts]
        heads, blocks, _, width = found[0].shape
        out = self.of(heads, blocks, sum(x.shape[2] for x in found), width)
        return torch.cat(found, dim=2, out=out)
