"""The keys of each block as views, and the work a cache-sized piece at a time."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lsg_patch.attention.bias import BlockBias
from lsg_patch.attention.blocks import Blocks, Keys, additive, joined_masks
from lsg_patch.attention.geometry import Run, unfold_windows

# bytes of the keys, values and scores of a piece, for each thread: what its cache holds until used
CACHE_BYTES = 8 << 20
MOST_THREADS = 8  # whose caches are counted: what several threads share does not grow with them
FIRST_THREADS = torch.get_num_threads()


class Piece(NamedTuple):
    """Blocks of one run: of all rows and heads, or of some.

    Attributes:
        blocks: the queries and keys of these rows and heads, of all blocks.
        run: the blocks.
        has_hidden: whether some key in their windows is hidden by the mask.
        bias: of these heads.
        causal: False where a key is after its query, (1, 1, 1, b, keys).
        rows, heads: of the batch.
    """

    blocks: Blocks
    run: Run
    has_hidden: bool = True
    bias: BlockBias | None = None
    causal: Tensor | None = None
    rows: slice = slice(None)
    heads: slice = slice(None)

    @classmethod
    def whole(cls, blocks: Blocks, run: Run, has_hidden: bool = True) -> Piece:
        """A run of all rows and heads."""
        bias = blocks.bias and blocks.bias.by_block(run.num_queries)
        whole = cls(blocks, run, has_hidden, bias)
        return whole._replace(causal=whole._causal()) if blocks.geometry.is_causal else whole

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(rows, heads, blocks, b)."""
        return *self.blocks.query.shape[:2], self.run.num_blocks, self.run.num_queries

    @property
    def num_keys(self) -> int:
        """Keys that a block sees."""
        windows = (*self.run.sparse, self.run.local)
        return self.blocks.global_keys.key.shape[2] + sum(window.size for window in windows)

    @property
    def query(self) -> Tensor:
        """Its queries, a view (rows, heads, blocks, b, D)."""
        return self.run.queries(self.blocks.query)

    def part(self, x: Tensor) -> Tensor:
        """The same part of ``x`` (B, H, T, D), of all rows and heads."""
        return self.run.queries(x[self.rows, self.heads])

    def windows(self, name: str) -> list[Tensor]:
        """Views (rows, heads, blocks, size, ...) of the ``name`` of global, sparse and token keys."""
        run, blocks, dim = self.run, self.blocks, 2
        shared = getattr(blocks.global_keys, name).unsqueeze(dim)
        found = [shared.expand(*shared.shape[:dim], run.num_blocks, *shared.shape[dim + 1 :])]
        for keys, windows in ((blocks.sparse, run.sparse), (blocks.tokens, (run.local,))):
            if keys is not None and windows:
                x = getattr(keys, name)
                found += unfold_windows(x, windows, run.num_blocks, dim, run.first_block)
        return [x for x in found if x.shape[dim + 1]]

    def added(self) -> Tensor | None:
        """Mask and bias, as what is added to scores: (1 or rows, 1 or heads, 1 or blocks, 1 or b, keys)."""
        bias = self.bias and self.bias.between(self._positions())
        seen = self.causal
        if self.has_hidden:
            known = joined_masks(self.windows("mask")).unsqueeze(-2)
            seen = known if seen is None else known & seen
        return bias if seen is None else additive(seen, self.blocks.query.dtype, bias)

    def _causal(self) -> Tensor:
        """Which keys are not after a query: those of its own block come last."""
        query, num_queries, num_keys = self.blocks.query, self.run.num_queries, self.num_keys
        own = min(num_queries, self.run.local.size)
        seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        seen[:, num_keys - own :].tril_(own - num_queries)
        return seen[None, None, None]

    def _positions(self) -> list[Tensor]:
        """Positions of the keys of ``windows``, counted from the start of the block that sees them.

        Each (1 or rows, 1 or heads, 1 or blocks, size): what is the same for all blocks is there once.
        """
        bias, sparse, geometry = self.blocks.bias, self.blocks.sparse, self.blocks.geometry
        run = self.run
        assert bias is not None
        of_globals = bias.global_positions(self.blocks.global_keys.key.shape[2])
        device = of_globals.device
        block = torch.arange(run.first_block, run.first_block + run.num_blocks, device=device)
        start = geometry.block_size * block[:, None]
        found = [of_globals.unsqueeze(2) - start]
        if sparse is not None and sparse.positions is not None and run.sparse:
            views = unfold_windows(sparse.positions, run.sparse, run.num_blocks, 2, run.first_block)
            found += [x - start for x in views]
        elif sparse is not None:
            for window in run.sparse:
                index = torch.arange(window.start, window.start + window.size, device=device)
                found.append(geometry.sparse_positions(index)[None, None, None])
        token = torch.arange(run.local.start, run.local.start + run.local.size, device=device)
        return [*found, token[None, None, None]]


def runs(blocks: Blocks) -> Iterator[Piece]:
    """All blocks, with windows that the ends of the sequence and keys hidden there cut off."""
    hidden_globals, hidden_sparse, hidden_tokens = (
        _hidden(keys) for keys in (blocks.global_keys, blocks.sparse, blocks.tokens)
    )
    geometry, length = blocks.geometry, blocks.query.shape[2]
    # most often the one token that a global token replaces
    first = _never_seen(blocks.tokens.mask[:, :, : geometry.block_size - 1]) if hidden_tokens else 0
    num_sparse = 0
    if blocks.sparse is not None:
        num_sparse = blocks.sparse.key.shape[2]
        if hidden_sparse:  # most often those of a last block that is not full
            num_sparse -= _never_seen(blocks.sparse.mask.flip(-1))
    for run in geometry.runs(range(first, length), range(num_sparse)):
        spans = [(hidden_sparse, window) for window in run.sparse] + [(hidden_tokens, run.local)]
        has_hidden = bool(hidden_globals) or any(_holds(run.span(w), x) for x, w in spans)
        yield Piece.whole(blocks, run, has_hidden)


def pieces(blocks: Blocks, most_bytes: int) -> Iterator[Piece]:
    """The same in pieces whose keys, values and scores take about ``most_bytes``.

    All heads together, where they fit, as they are neighbours in memory, and then all blocks.
    """
    batch, heads, _, width = blocks.query.shape
    for whole in runs(blocks):
        run = whole.run
        block_bytes = whole.num_keys * (2 * width + run.num_queries) * blocks.query.element_size()
        most = max(1, most_bytes // block_bytes)
        for some_rows in _shares(batch, max(1, most // (heads * run.num_blocks))):
            for some_heads in _shares(heads, most):
                part = blocks.part(some_rows, some_heads)
                bias = whole.bias and BlockBias(whole.bias.rows[some_heads])
                for some_blocks in _shares(run.num_blocks, max(1, most // heads)):
                    some = run._replace(
                        first_block=run.first_block + some_blocks.start,
                        num_blocks=some_blocks.stop - some_blocks.start,
                    )
                    yield Piece(
                        part, some, whole.has_hidden, bias, whole.causal, some_rows, some_heads
                    )


def cache_bytes(with_dropout: bool = False) -> int:
    """Of a piece: what the caches of the threads hold.

    Dropout is drawn piece by piece, and is to be the same when a checkpoint runs again: then the
    number of threads is that of this module's import, whatever it is by now.
    """
    threads = FIRST_THREADS if with_dropout else torch.get_num_threads()
    return min(threads, MOST_THREADS) * CACHE_BYTES


def _shares(count: int, most: int) -> Iterator[slice]:
    """Shares of ``count`` of about ``most``, as equal as even ones can be: for two threads or more."""
    size = -(-count // max(1, -(-count // most)))
    size += size % 2 if 1 < size < count else 0
    for start in range(0, count, size or 1):
        yield slice(start, min(start + size, count))


def _hidden(keys: Keys | None) -> list[int]:
    """Where keys are that some row or head does not see, in order."""
    if keys is None or bool(keys.mask.all()):
        return []
    seen = keys.mask.flatten(0, 1).all(0)
    found: list[int] = seen.logical_not().nonzero().flatten().tolist()
    return found


def _never_seen(mask: Tensor) -> int:
    """Keys of ``mask`` (B, 1 or H, n) before the first one that is seen in some row or head."""
    seen: list[bool] = mask.flatten(0, 1).any(0).tolist()
    return [*seen, True].index(True)


def _holds(span: range, indices: list[int]) -> bool:
    """Whether one of ``indices``, which are in order, is in ``span``."""
    next_one = bisect_left(indices, span.start)
    return next_one < len(indices) and indices[next_one] < span.stop


class Workspace:
    """Memory that is used for one piece after the other: fresh pages cost more than a product."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def of(self, role: str, like: Tensor, *shape: int) -> Tensor:
        """Contiguous memory of ``shape``; its contents are undefined, and gone at the role's next use."""
        size = math.prod(shape)
        if role not in self._memory or self._memory[role].numel() < size:
            self._memory[role] = like.new_empty(size)
        return self._memory[role][:size].view(shape)

    def gather(self, role: str, parts: list[Tensor], num_keys: int) -> Tensor:
        """``parts`` (rows, heads, blocks, size, D) side by side, then zeros: (N, num_keys, D)."""
        *shape, _, width = parts[0].shape
        missing = num_keys - sum(x.shape[3] for x in parts)
        if missing:
            parts = [*parts, parts[0].new_zeros(()).expand(*shape, missing, width)]
        memory = self.of(role, parts[0], *shape, num_keys, width)
        return torch.cat(parts, dim=3, out=memory).flatten(0, 2)
