"""Which keys a block of queries sees, as index ranges. The one home of that arithmetic.

Source: Condevaux & Harispe, "LSG Attention: Extrapolation of pretrained Transformers to long
sequences" (arXiv 2210.15497), and the ranges that its reference implementation intends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lsg_patch.attention.compiling import is_exporting

MOST = 1 << 24  # of any size: more tokens than any memory holds


def check_int(name: str, value: object, least: int, most: int = MOST) -> None:
    """Raises a ValueError that names the argument if ``value`` is no whole number in these bounds."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}, not {value!r}")


def check_bool(name: str, value: object) -> None:
    """Raises a ValueError that names the argument if ``value`` is neither True nor False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, not {value!r}")


# Blocks of 4 tokens, a sparse token for 2 tokens and sparse blocks of 4. What block 3 of 34 tokens sees:
#
#   block          |   0   |   1   |   2   |   3   |   4   |   5   |   6   |   7   | 8 |
#   tokens         |. . . .|. . . .|. . . .|. . . .|. . . .|. . . .|. . . .|. . . .|. .|
#   sparse tokens  | s   s | s   s | s   s | s   s | s   s | s   s | s   s | s   s | s |
#   local window                   [-----------------------]   its own block and the neighbours
#   sparse windows [---------------]                       [---------------]   sparse tokens beside them
#   runs           |   0   |   1   |   2   |       3       |   4   |   5   |   6   | 7 |
#
# The ends of the sequence cut windows off: a run is neighbouring blocks whose windows have the same
# sizes, as blocks 3 and 4. A piece (`backends/pieces.py`) is as much of a run, for some heads and some
# rows of the batch, as a processor's cache holds: what is computed at a time.


@dataclass(frozen=True)
class Window:
    """Block ``j`` of queries sees the keys ``[j * stride + start, j * stride + start + size)``."""

    start: int
    size: int
    stride: int

    def blocks_that_see(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """The first and the last block whose window holds ``key``; some may not exist."""
        first = (key - self.start - self.size).div(self.stride, rounding_mode="floor") + 1
        return first, (key - self.start).div(self.stride, rounding_mode="floor")

    def clipped(self, block: int, begin: int, end: int) -> Window:
        """What of it block ``block`` sees among the keys ``[begin, end)``."""
        offset = block * self.stride
        begin = max(begin, offset + self.start)
        end = min(end, offset + self.start + self.size)
        return Window(begin - offset, max(0, end - begin), self.stride)


class Run(NamedTuple):
    """``num_blocks`` neighbouring blocks of ``num_queries`` queries each, whose windows are alike."""

    first_block: int
    num_blocks: int
    num_queries: int
    local: Window
    sparse: tuple[Window, ...]

    def queries(self, x: Tensor) -> Tensor:
        """Its rows of ``x`` (B, H, T, D), as a view (B, H, num_blocks, num_queries, D)."""
        start = self.first_block * self.local.stride
        rows: Tensor = x[:, :, start : start + self.num_blocks * self.num_queries]
        return rows.view(*x.shape[:2], self.num_blocks, self.num_queries, *x.shape[3:])

    def span(self, window: Window) -> range:
        """The keys that any of its blocks sees through ``window``."""
        start = window.start + window.stride * self.first_block
        return range(start, start + window.stride * (self.num_blocks - 1) + window.size)


@dataclass(frozen=True)
class Geometry:
    """The shape of LSG attention, in tokens.

    ``block_size`` queries share their keys: the tokens of their own and the neighbouring blocks,
    and ``sparse_block_size`` sparse tokens on each side, one for ``sparsity_factor`` tokens, that
    begin where the local window ends. ``sparse_block_size`` 0 means no sparse part. With
    ``is_causal`` only the left side is seen.

    Raises:
        ValueError: a size is negative, or ``sparsity_factor`` does not divide both block sizes.
    """

    block_size: int
    sparse_block_size: int = 0
    sparsity_factor: int = 1
    is_causal: bool = False

    def __post_init__(self) -> None:
        for name in ("block_size", "sparse_block_size", "sparsity_factor"):
            check_int(name, getattr(self, name), int(name != "sparse_block_size"))
        if not self.has_sparse:
            return
        for name in ("block_size", "sparse_block_size"):
            value, factor = getattr(self, name), self.sparsity_factor
            if value % factor:
                raise ValueError(
                    f"{name}={value} must be a multiple of sparsity_factor={factor}: pass "
                    f"{name}={-(-value // factor) * factor}, or a factor that divides it, such as 1"
                )

    @property
    def has_sparse(self) -> bool:
        return self.sparse_block_size > 0

    @property
    def full_length(self) -> int:
        """Up to this many tokens every token sees every other one."""
        return 2 * self.block_size

    @property
    def sparse_per_block(self) -> int:
        """Sparse tokens of one block of tokens."""
        return self.block_size // self.sparsity_factor

    @property
    def chunk(self) -> int:
        """Tokens among which ``norm`` and ``lsh`` choose: a block, or an equal part of one."""
        return math.gcd(self.block_size, min(self.block_size, self.sparse_block_size))

    @property
    def cuts_chunks(self) -> bool:
        """Whether windows end inside of chunks, so that the order of what is chosen there counts."""
        return self.sparse_block_size % self.chunk > 0

    def num_blocks(self, length: int) -> int:
        """Blocks that hold ``length`` tokens, the last one filled up with padding."""
        return (length + self.block_size - 1) // self.block_size

    def padded(self, length: int) -> int:
        """``length`` rounded up to whole blocks, where blocks are used at all."""
        return length if length <= self.full_length else self.num_blocks(length) * self.block_size

    @property
    def local_window(self) -> Window:
        """Tokens that a block sees: its own block and its neighbours."""
        size = self.block_size
        return Window(-size, (2 if self.is_causal else 3) * size, size)

    @property
    def sparse_windows(self) -> tuple[Window, ...]:
        """Sparse tokens that a block sees: those that end, and begin, at its local window's edges."""
        if not self.has_sparse:
            return ()
        size, stride = self.sparse_block_size, self.sparse_per_block
        left, right = Window(-stride - size, size, stride), Window(2 * stride, size, stride)
        return (left,) if self.is_causal else (left, right)

    def sparse_positions(self, index: Tensor) -> Tensor:
        """Positions of the sparse tokens ``index``, for selections that average neighbouring tokens."""
        return index * self.sparsity_factor + (self.sparsity_factor - 1) // 2

    def runs(self, tokens: range, sparse: range) -> tuple[Run, ...]:
        """The blocks of ``tokens.stop`` tokens, with windows that hold ``tokens`` and ``sparse`` alone."""
        return _runs(self, tokens, sparse)


@lru_cache(maxsize=256)
def _runs(geometry: Geometry, tokens: range, sparse: range) -> tuple[Run, ...]:
    length = tokens.stop

    def shape(block: int) -> tuple[int, Window, tuple[Window, ...]]:
        num_queries = min(geometry.block_size, length - block * geometry.block_size)
        local = geometry.local_window.clipped(block, tokens.start, length)
        windows = (w.clipped(block, sparse.start, sparse.stop) for w in geometry.sparse_windows)
        return num_queries, local, tuple(window for window in windows if window.size)

    alike = [(key, list(run)) for key, run in groupby(range(geometry.num_blocks(length)), shape)]
    return tuple(Run(run[0], len(run), *key) for key, run in alike)


def unfold_windows(
    x: Tensor, windows: tuple[Window, ...], num_blocks: int, dim: int, first_block: int = 0
) -> list[Tensor]:
    """Views of ``x`` cut into windows along ``dim``, zeros (False) where a window leaves it.

    ``x`` (..., n, ...) gives one (..., num_blocks, size, ...) for each window, of the blocks from
    ``first_block`` on: all are views of ``x``, or of one padded copy.
    """
    dim %= x.dim()
    length = x.shape[dim]
    if is_exporting():
        return [_looked_up(x, window, num_blocks, dim, first_block) for window in windows]
    spans = [
        (w.start + first_block * w.stride, (num_blocks - 1) * w.stride + w.size) for w in windows
    ]
    before = max(0, *(-start for start, _ in spans))
    after = max(0, *(start + size - length for start, size in spans))
    if before or after:
        x = F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (before, after))
    return [
        x.narrow(dim, before + start, size).unfold(dim, w.size, w.stride).movedim(-1, dim + 1)
        for w, (start, size) in zip(windows, spans, strict=True)
    ]


def _looked_up(x: Tensor, window: Window, num_blocks: int, dim: int, first_block: int) -> Tensor:
    """A window of each block by index: an exporter's sizes are not known, which views need."""
    block = torch.arange(num_blocks, device=x.device)[:, None] + first_block
    index = block * window.stride + window.start + torch.arange(window.size, device=x.device)
    length = x.shape[dim]
    rows = x.index_select(dim, index.clamp(min=0).clamp(max=length - 1).flatten())
    found: Tensor = rows.unflatten(dim, (num_blocks, window.size))
    inside = (index >= 0) & (index < length)
    inside = inside.view(*inside.shape, *(1,) * (x.dim() - 1 - dim))
    return found & inside if x.dtype == torch.bool else found * inside
