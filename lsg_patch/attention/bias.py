"""What the distance of a key from its query adds to their score, in linear memory.

Positions of keys: a token's own, also as a sparse token; a pooled sparse token (pooling,
bos_pooling, lsh) has the mean position of the tokens that it is made of, rounded down, whatever their
weights (pooling and bos_pooling: also of those that are masked); a global row that which the caller gives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RelativeBias(NamedTuple):
    """A bias of each head by distance.

    Attributes:
        table: (H, 2 * m + 1): entry ``m + d`` for a key ``d`` tokens behind its query, before it if
            ``d`` is negative; keys more than ``m`` tokens away have the bias of ``m``.
        positions: (1 or B, N), of the rows, the global ones first; None, without global
            rows: 0, 1, 2, ... Beyond two blocks the first token's position counts, and the others are
            taken to follow it one by one.
    """

    table: Tensor
    positions: Tensor | None = None

    @property
    def reach(self) -> int:
        """The distance from which on the bias is the same: ``m``."""
        return self.table.shape[1] // 2

    def part(self, rows: slice, heads: slice) -> RelativeBias:
        """The bias of these rows of the batch and these heads."""
        positions = self.positions
        if positions is not None and len(positions) > 1:
            positions = positions[rows]
        return RelativeBias(self.table[heads], positions)

    def between(self, query: Tensor, key: Tensor) -> Tensor:
        """(1 or B, H, n, m) for queries at (1 or B, n) and keys at (1 or B, 1 or H, m)."""
        distance = key.unsqueeze(-2) - query[:, None, :, None]
        return _look_up(self.table, distance.clamp(-self.reach, self.reach) + self.reach)

    def between_rows(self, length: int, queries: slice, keys: slice) -> Tensor:
        """(1 or B, H, n, m) for these ``queries`` and ``keys`` of the ``length`` rows."""
        positions = self.positions
        if positions is None:
            positions = torch.arange(length, device=self.table.device)[None]
        return self.between(positions[:, queries], positions[:, None, keys])

    def global_positions(self, num_global: int) -> Tensor:
        """(1 or B, 1, num_global): positions of the global rows, counted from the first token."""
        if self.positions is None:
            return torch.zeros(1, 1, 0, dtype=torch.long, device=self.table.device)
        positions = self.positions[:, None, : num_global + 1]
        return positions[..., :-1] - positions[..., -1:]

    def by_block(self, block_size: int) -> BlockBias:
        """The same for blocks of queries."""
        query = torch.arange(block_size, device=self.table.device)
        key = torch.arange(-self.reach, self.reach + block_size, device=self.table.device)
        return BlockBias(self.between(query[None], key[None, None])[0].transpose(1, 2))


class BlockBias(NamedTuple):
    """``rows`` (H, 2 * m + b, b): row ``m + k`` for a key ``k`` tokens behind a block's first query.

    Farther keys have the bias of the outermost ones, so that a key has one row for all of a block's
    queries: looking it up takes no index for each score.
    """

    rows: Tensor

    def between(self, keys: list[Tensor]) -> Tensor:
        """(1 or B, H, 1 or blocks, b, all n) for ``keys`` at (1 or B, 1 or H, 1 or blocks, n) each.

        They are counted from their block's start.
        """
        _, starts, block_size = self.rows.shape
        reach = (starts - block_size) // 2
        indices = [x.clamp(-reach, reach + block_size - 1) + reach for x in keys]
        found = [_look_up(self.rows, index).transpose(-1, -2) for index in indices]
        shape = torch.broadcast_shapes(*(x.shape[:-1] for x in found))
        return torch.cat([x.expand(*shape, -1) for x in found], dim=-1)


def _look_up(x: Tensor, index: Tensor) -> Tensor:
    """Entries (..., H, k, n, ...) of ``x`` (H, m, ...) at ``index`` (..., 1 or H, k, n)."""
    return x[torch.arange(len(x), device=x.device)[:, None, None], index]
