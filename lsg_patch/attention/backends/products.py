"""Training on a CPU: no score is kept for the backward, each block is computed again there.

What is kept is the input, the output, and of each query the greatest score and the sum that its
softmax divides by. Source: Dao et al., "FlashAttention" (arXiv 2205.14135), section 3.1 and
appendix B.2, with the windows of LSG in place of all keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsg_patch.attention.backends.windows import (
    Buffer,
    Piece,
    Windows,
    causal,
    pieces,
    windows,
)
from lsg_patch.attention.blocks import Blocks, memory_like
from lsg_patch.attention.geometry import Geometry, Run, Window, unfold_windows
from lsg_patch.attention.keys import Keys, additive

# half precision would lose what the sums are made of
DTYPES = (torch.float32, torch.float64)
# bytes of the scores of a piece: they, what they are made of and what becomes of them stay in cache
CACHE_BYTES = 3 << 20


def can_run(blocks: Blocks) -> bool:
    return blocks.bias is None and blocks.query.dtype in DTYPES


def block_attention(blocks: Blocks) -> Tensor:
    """LSG attention of the tokens' queries, behind the front: (B, H, g + T, D); differentiable once."""
    seed = 0
    if blocks.dropout_p:
        # by the global random state, so that checkpointing and a seed of the user repeat it
        seed = int(torch.randint(2**62, (), dtype=torch.int64))
    sides = (blocks.global_keys, blocks.sparse, blocks.tokens)
    work = _Work(
        tuple(None if keys is None else keys.mask for keys in sides),
        blocks.geometry,
        blocks.scale,
        blocks.dropout_p,
        seed,
    )
    tensors = [x for keys in sides for x in ((None, None) if keys is None else keys[:2])]
    out: Tensor = _BlockAttention.apply(work, blocks.query, blocks.front, *tensors)
    return out


class _Work(NamedTuple):
    """What is asked for, besides the tensors that have gradients."""

    masks: tuple[Tensor | None, ...]
    geometry: Geometry
    scale: float
    dropout_p: float
    seed: int

    def blocks(self, query: Tensor, sides: tuple[Tensor | None, ...]) -> Blocks:
        of_globals, sparse, tokens = (
            None if key is None or value is None or mask is None else Keys(key, value, mask)
            for key, value, mask in zip(sides[::2], sides[1::2], self.masks, strict=True)
        )
        assert of_globals is not None and tokens is not None
        return Blocks(query, of_globals, sparse, tokens, self.geometry, self.scale, self.dropout_p)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, work: _Work, query: Tensor, front: Tensor | None, *sides: Tensor | None
    ) -> Tensor:
        before = 0 if front is None else front.shape[2]
        out = memory_like(query, before + query.shape[2])
        if front is not None:
            out[:, :, :before] = front
        most = query.new_empty(query.shape[:3])
        total = torch.empty_like(most)
        values = Buffer(query)
        for step in _steps(work.blocks(query, sides), work.seed):
            scores = step.scores()
            of_most = torch.amax(scores, dim=-1, keepdim=True)
            scores.sub_(of_most).exp_()
            of_total = scores.sum(dim=-1, keepdim=True)
            step.of(most).copy_(of_most.view(step.shape))
            step.of(total).copy_(of_total.view(step.shape))
            if step.kept is not None:
                scores.mul_(step.kept)
            value = values.gather(step.seen.value, step.piece).flatten(0, 1)
            answer = torch.bmm(scores, value).mul_(step.rescale / of_total)
            step.of(out[:, :, before:]).copy_(answer.view(*step.shape, -1))
        ctx.work, ctx.before = work, before
        ctx.save_for_backward(query, out, most, total, *sides)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        work, before = ctx.work, ctx.before
        query, out, most, total, *sides = ctx.saved_tensors
        out, given = out[:, :, before:], grad[:, :, before:]
        grads = [None if x is None else torch.zeros_like(x) for x in sides]
        of_query = memory_like(query, query.shape[2])
        values, products = Buffer(query), Buffer(query)
        for step in _steps(work.blocks(query, sides), work.seed):
            weights = step.scores()
            rows = weights.shape[:2]
            weights.sub_(step.of(most).reshape(*rows, 1)).exp_()
            # what a row of the softmax is divided by goes into its gradient, which is narrower
            of_out = step.of(given).reshape(*rows, -1) / step.of(total).reshape(*rows, 1)
            mean = (of_out * step.of(out).reshape(of_out.shape)).sum(-1, keepdim=True)
            of_out.mul_(step.rescale)
            value = values.gather(step.seen.value, step.piece).flatten(0, 1)
            of_scores = torch.bmm(of_out, value.transpose(1, 2), out=products.of(*weights.shape))
            kept = weights
            if step.kept is not None:
                of_scores.mul_(step.kept)
                kept = step.kept.mul_(weights)
            # the windows of values and keys are used up, their memory takes the gradients
            _add(grads[1::2], step, torch.bmm(kept.transpose(1, 2), of_out, out=value))
            of_scores.sub_(mean).mul_(weights)
            answer = torch.bmm(of_scores, step.key).mul_(work.scale)
            step.of(of_query).copy_(answer.view(*step.shape, -1))
            _add(grads[::2], step, torch.bmm(of_scores.transpose(1, 2), step.query, out=value))
        return None, of_query, grad[:, :, :before] if before else None, *grads


class _Step(NamedTuple):
    """One piece: some heads and blocks, N in all.

    Attributes:
        query: (N, b, D), scaled.
        key: (N, keys, D).
        kept: (N, b, keys), 1 for a probability that dropout keeps and 0 for others; None: no dropout.
        rescale: what the kept ones are multiplied with.
    """

    run: Run
    piece: Piece
    seen: Windows
    query: Tensor
    key: Tensor
    mask: Tensor | None
    causal: Tensor | None
    kept: Tensor | None
    rescale: float
    memory: Buffer

    @property
    def shape(self) -> tuple[int, int, int]:
        """(heads, blocks, b)."""
        heads, blocks = (s.stop - s.start for s in (self.piece.heads, self.piece.blocks))
        return heads, blocks, self.run.queries

    def of(self, x: Tensor) -> Tensor:
        """Its queries of ``x`` (B, H, T, ...), as a view (heads, blocks, b, ...)."""
        return self.run.of(x)[self.piece]

    def scores(self) -> Tensor:
        """(N, b, keys), masked."""
        out = self.memory.of(*self.query.shape[:2], self.key.shape[1])
        torch.bmm(self.query, self.key.transpose(1, 2), out=out)
        if self.mask is not None:
            out.view(*self.shape, -1).add_(self.mask)
        if self.causal is not None:
            out.add_(self.causal)
        return out


def _steps(blocks: Blocks, seed: int) -> Iterator[_Step]:
    """All pieces, in the same order forward and backward: dropout is drawn piece by piece."""
    query, geometry = blocks.query, blocks.geometry
    queries, keys, scores, kept = (Buffer(query) for _ in range(4))
    dropout = _Dropout(blocks.dropout_p, seed)
    batch, heads, length, _ = query.shape
    for run in geometry.runs(length, blocks.num_sparse):
        seen = windows(blocks, run)
        mask = None if bool(seen.seen.all()) else additive(seen.seen, query.dtype)
        before = causal(run.queries, seen.size, query) if geometry.is_causal else None
        asking = run.of(query)
        size = seen.size * run.queries * query.element_size()
        for piece in pieces(batch, heads, run.blocks, max(1, CACHE_BYTES // size)):
            some = asking[piece]
            of_query = torch.mul(some, blocks.scale, out=queries.of(*some.shape)).flatten(0, 1)
            yield _Step(
                run,
                piece,
                seen,
                of_query,
                keys.gather(seen.key, piece).flatten(0, 1),
                None if mask is None else piece.of(mask),
                before,
                dropout.draw(kept.of(*of_query.shape[:2], seen.size)) if dropout.rate else None,
                dropout.rescale,
                scores,
            )


class _Dropout:
    """Which probabilities are kept: 16 random bits for each of them, the same for the same seed.

    Four times as fast as a float for each, and as exact: a rate of 0.1 is one of 0.1 + 7e-6 at most.
    """

    def __init__(self, rate: float, seed: int) -> None:
        self.rate = rate
        dropped = round(rate * 2**16)
        self.rescale = 2**16 / (2**16 - dropped) if dropped < 2**16 else 0.0
        self._least = dropped - 2**15
        self._generator = torch.Generator().manual_seed(seed)
        self._bits: Tensor | None = None

    def draw(self, out: Tensor) -> Tensor:
        """Fills ``out`` with 1 and 0."""
        words = -(-out.numel() // 4)
        if self._bits is None or len(self._bits) < words:
            self._bits = torch.empty(words, dtype=torch.int64)
        bits = self._bits[:words].random_(-(2**63), None, generator=self._generator)
        out.copy_(bits.view(torch.int16)[: out.numel()].view(out.shape))
        return torch.ge(out, self._least, out=out)


def _add(grads: list[Tensor | None], step: _Step, given: Tensor) -> None:
    """Adds to the gradients of global, sparse and token rows what the windows give them.

    ``given`` (N, keys, D). Windows of neighbouring blocks overlap: each is added in parts that do not.
    """
    of_globals, of_sparse, of_tokens = grads
    assert of_globals is not None and of_tokens is not None
    run, piece = step.run, step.piece
    given = given.view(*step.shape[:2], *given.shape[1:])
    count = of_globals.shape[2]
    of_globals[piece.row, piece.heads].add_(given[:, :, :count].sum(1))
    first, blocks = run.first + piece.blocks.start, step.shape[1]
    spans = [(of_sparse, window) for window in run.sparse] + [(of_tokens, run.local)]
    for grad, window in spans:
        assert grad is not None
        for part in _parts(window):
            views = unfold_windows(grad[piece.row, piece.heads], (part,), blocks, 1, first)
            views[0].add_(given[:, :, count : count + part.size])
            count += part.size


def _parts(window: Window) -> Iterator[Window]:
    """Parts of a window that do not overlap with those of the next block."""
    for start in range(0, window.size, window.stride):
        size = min(window.stride, window.size - start)
        yield Window(window.start + start, size, window.stride)
