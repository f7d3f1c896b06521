"""What the distance of a key from its query adds to their score, in linear memory.

Where keys stand: a token at its own place, also as a sparse token; a pooled sparse token (pooling,
bos_pooling, lsh) at the mean place of the tokens that it is made of, rounded down, whatever their
weights (pooling and bos_pooling: of its whole run, whatever is masked); a global row where the
caller says.
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
        global_positions: (g,), where the global rows stand; the first token stands at 0.
    """

    table: Tensor
    global_positions: Tensor

    @property
    def reach(self) -> int:
        """The distance from which on the bias is the same: ``m``."""
        return self.table.shape[1] // 2

    def between(self, query: Tensor, key: Tensor) -> Tensor:
        """(1 or B, H, n, m) for queries at (n,) and keys at (1 or B, 1 or H, m)."""
        distance = key.unsqueeze(-2) - query[:, None]
        return _of_each_head(self.table, distance.clamp(-self.reach, self.reach) + self.reach)

    def of_rows(self, length: int, queries: slice, keys: slice) -> Tensor:
        """(1, H, n, m) for some of the rows [global rows | ``length`` tokens] and some of them."""
        token = torch.arange(length, device=self.table.device)
        place = torch.cat([self.global_positions, token])
        return self.between(place[queries], place[None, None, keys])

    def of_blocks(self, block_size: int) -> BlockBias:
        """The same for blocks of queries."""
        query = torch.arange(block_size, device=self.table.device)
        key = torch.arange(-self.reach, self.reach + block_size, device=self.table.device)
        return BlockBias(self.between(query, key[None, None])[0].transpose(1, 2))


class BlockBias(NamedTuple):
    """``rows`` (H, 2 * m + b, b): row ``m + k`` for a key ``k`` tokens behind a block's first query.

    Farther keys have the bias of the outermost ones, so that a key has one row for all of a block's
    queries: looking it up takes no index for each score.
    """

    rows: Tensor

    def of(self, key: Tensor) -> Tensor:
        """(..., H, 1 or blocks, b, n) of keys at (..., 1 or H, 1 or blocks, n) from their block's start."""
        _, starts, block_size = self.rows.shape
        reach = (starts - block_size) // 2
        index = key.clamp(-reach, reach + block_size - 1) + reach
        return _of_each_head(self.rows, index).transpose(-1, -2)


def _of_each_head(x: Tensor, index: Tensor) -> Tensor:
    """Entries (..., H, k, n, ...) of ``x`` (H, m, ...) at ``index`` (..., 1 or H, k, n)."""
    return x[torch.arange(len(x), device=x.device)[:, None, None], index]
