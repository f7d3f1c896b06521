"""Which keys a block of queries sees, as index ranges. The one home of that arithmetic.

Source: Condevaux & Harispe, "LSG Attention: Extrapolation of pretrained Transformers to long
sequences" (arXiv 2210.15497), and the ranges that its reference implementation intends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


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
            value, least = getattr(self, name), int(name != "sparse_block_size")
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(
                    f"{name} must be a whole number of at least {least}, not {value!r}"
                )
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
    def step(self) -> int:
        """Sparse tokens a block of tokens gives."""
        return self.block_size // self.sparsity_factor

    @property
    def chunk(self) -> int:
        """Tokens among which ``norm`` and ``lsh`` choose: a block, or the part that a smaller
        sparse block divides it into. Chunks tile the blocks, so that none is cut by padding.
        """
        return math.gcd(self.block_size, min(self.block_size, self.sparse_block_size))

    def num_blocks(self, length: int) -> int:
        """Blocks that hold ``length`` tokens, the last one filled up with padding."""
        return -(-length // self.block_size)

    def padded(self, length: int) -> int:
        """``length`` rounded up to whole blocks, where blocks are used at all."""
        return length if length <= self.full_length else self.num_blocks(length) * self.block_size

    @property
    def local_window(self) -> Window:
        """Tokens that a block sees: its own block and its neighbours."""
        return Window(
            -self.block_size, (2 if self.is_causal else 3) * self.block_size, self.block_size
        )

    @property
    def sparse_windows(self) -> tuple[Window, ...]:
        """Sparse tokens that a block sees: those that end, and begin, at its local window's edges."""
        if not self.has_sparse:
            return ()
        left = Window(-self.step - self.sparse_block_size, self.sparse_block_size, self.step)
        right = Window(2 * self.step, self.sparse_block_size, self.step)
        return (left,) if self.is_causal else (left, right)

    def run_positions(self, index: Tensor) -> Tensor:
        """Where the sparse tokens of this ``index`` stand that are made of runs of tokens: mid-run."""
        return index * self.sparsity_factor + (self.sparsity_factor - 1) // 2


def unfold_windows(
    x: Tensor, windows: tuple[Window, ...], num_blocks: int, dim: int
) -> list[Tensor]:
    """Views of ``x`` cut into windows along ``dim``, zeros (False) where a window leaves it.

    ``x`` (..., n, ...) gives one (..., num_blocks, size, ...) for each window, all of them views
    of one padded copy: nothing is gathered.
    """
    dim %= x.dim()
    length = x.shape[dim]
    first = min(0, *(w.start for w in windows))
    last = max(length, *(w.start + (num_blocks - 1) * w.stride + w.size for w in windows))
    padded = F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (-first, last - length))
    views = []
    for w in windows:
        span = padded.narrow(dim, w.start - first, (num_blocks - 1) * w.stride + w.size)
        views.append(span.unfold(dim, w.size, w.stride).movedim(-1, dim + 1))
    return views
