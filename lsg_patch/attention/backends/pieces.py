"""Work a cache-sized piece at a time, in memory that is used again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from lsg_patch.attention.geometry import Run, Window

# bytes of the keys, values and scores of a piece, for each thread: what its cache holds until used
CACHE_BYTES = 4 << 20
MOST_THREADS = 16  # whose caches are counted: what several threads share does not grow with them
FIRST_THREADS = torch.get_num_threads()
KEPT_BYTES = 64 << 20  # of one piece of memory, at most, that is kept for the next call
KEPT_WORKSPACES = 4  # as many calls at a time find memory that was used before


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

    def window(self, x: Tensor, window: Window, run: Run) -> Tensor:
        """What its blocks, which are some of ``run``, see of ``x`` (B, H, n, D) through ``window``.

        A view (heads, blocks, size, D), in one step: blocks are many and small.
        """
        row, head, key, element = x.stride()
        start = window.start + window.stride * (run.first + self.blocks.start)
        return x.as_strided(
            (*self.shape, window.size, x.shape[3]),
            (head, window.stride * key, key, element),
            x.storage_offset() + self.row * row + self.heads.start * head + start * key,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(heads, blocks)."""
        return self.heads.stop - self.heads.start, self.blocks.stop - self.blocks.start


def cache_bytes(with_dropout: bool = False) -> int:
    """Of a piece: what the caches of the threads hold.

    Dropout is drawn piece by piece, and is to be the same when a checkpoint runs again: then the
    number of threads is that of this module's import, whatever it is by now.
    """
    threads = FIRST_THREADS if with_dropout else torch.get_num_threads()
    return min(threads, MOST_THREADS) * CACHE_BYTES


def pieces(query: Tensor, run: Run, keys: int, most_bytes: int) -> Iterator[Piece]:
    """The blocks of ``run`` of ``query`` (B, H, T, D), of ``keys`` keys each, in cache-sized pieces.

    All heads together, where they fit: of one token they are neighbours in memory.
    """
    batch, heads, _, width = query.shape
    of_block = keys * (2 * width + run.queries) * query.element_size()
    most = max(1, most_bytes // of_block)
    for row in range(batch):
        for some_blocks in _shares(run.blocks, max(1, most // heads)):
            for some_heads in _shares(heads, most):
                yield Piece(row, some_heads, some_blocks)


def _shares(count: int, most: int) -> Iterator[slice]:
    """Shares of ``count`` of about ``most``, as equal as even ones can be: for two threads or more."""
    size = -(-count // -(-count // most))
    size += size % 2 if 1 < size < count else 0
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


class Workspace:
    """Memory that is used for one piece after the other: fresh pages cost more than a product."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.dtype], Tensor] = {}

    def of(self, role: str, like: Tensor, *shape: int) -> Tensor:
        """Contiguous memory of ``shape``; its contents are undefined, and gone at the role's next use."""
        size, dtype = math.prod(shape), like.dtype
        memory = self._memory.get((role, dtype))
        if memory is None or memory.numel() < size:
            # what is made in inference mode could not be written to outside of it
            with torch.inference_mode(False):
                memory = torch.empty(size, dtype=dtype, device="cpu")
            self._memory[role, dtype] = memory
        return memory[:size].view(shape)

    def gather(self, role: str, parts: list[Tensor], keys: int) -> Tensor:
        """The ``parts`` (heads, blocks, size, D) side by side, then zeros: (heads, blocks, keys, D)."""
        heads, blocks, _, width = parts[0].shape
        missing = keys - sum(x.shape[2] for x in parts)
        if missing:
            parts = [*parts, parts[0].new_zeros(()).expand(heads, blocks, missing, width)]
        return torch.cat(parts, dim=2, out=self.of(role, parts[0], heads, blocks, keys, width))

    def shrink(self) -> None:
        """Gives up what is too large to be kept."""
        self._memory = {k: x for k, x in self._memory.items() if x.nbytes <= KEPT_BYTES}


_idle: list[Workspace] = []


@contextmanager
def workspace() -> Iterator[Workspace]:
    """A workspace of one's own, whose memory may come from an earlier call."""
    try:
        own = _idle.pop()  # atomic: no two threads get the same
    except IndexError:
        own = Workspace()
    try:
        yield own
    finally:
        own.shrink()
        if len(_idle) < KEPT_WORKSPACES:
            _idle.append(own)
