"""Whole matrix products, a cache-sized piece at a time: the scores of a piece are all that there is.

No score is kept for a backward, each piece is computed again there. Source: Dao et al.,
"FlashAttention" (arXiv 2205.14135), appendix B.2, with the windows of LSG in place of all keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsg_patch.attention.backends.pieces import Piece, Workspace, cache_bytes, pieces, workspace
from lsg_patch.attention.backends.windows import Windows, causal, runs
from lsg_patch.attention.blocks import Blocks, memory_like
from lsg_patch.attention.geometry import Geometry, Run, Window
from lsg_patch.attention.keys import Keys

# half precision would lose what the sums are made of
DTYPES = (torch.float32, torch.float64)
# rows of scores begin at whole cache lines: a product of 641 keys takes longer than one of 656
LINE_BYTES = 64


def can_run(blocks: Blocks) -> bool:
    return blocks.bias is None and blocks.query.dtype in DTYPES


def block_attention(blocks: Blocks) -> Tensor:
    """LSG attention of the tokens' queries, behind the front: (B, H, g + T, D); differentiable once."""
    draw = _Draw(cache_bytes(blocks.dropout_p > 0))
    if blocks.dropout_p:
        # by the global random state, so that checkpointing and a seed of the user repeat it
        draw = draw._replace(seed=int(torch.randint(2**62, (), dtype=torch.int64)))
    if not blocks.needs_grad:
        return _attend(blocks, draw)
    sides = (blocks.global_keys, blocks.sparse, blocks.tokens)
    work = _Work(
        tuple(None if keys is None else keys.mask for keys in sides),
        blocks.geometry,
        blocks.scale,
        blocks.dropout_p,
        draw,
    )
    tensors = [x for keys in sides for x in ((None, None) if keys is None else keys[:2])]
    out: Tensor = _BlockAttention.apply(work, blocks.query, blocks.front, *tensors)
    return out


class _Draw(NamedTuple):
    """What a forward decides for its backward as well: how it is cut, and what dropout drops there."""

    most_bytes: int
    seed: int = 0


def _attend(blocks: Blocks, draw: _Draw) -> Tensor:
    query, front, before = blocks.query, blocks.front, blocks.num_front
    out = memory_like(query, before + query.shape[2])
    if front is not None:
        out[:, :, :before] = front
    answers = out[:, :, before:]
    for step in _steps(blocks, draw):
        weights = step.weights()
        if step.kept is not None:
            weights.mul_(step.kept)
        answer, at = step.memory.of("answers", query, *step.query.shape), 0
        for values in step.value_parts():
            share = weights[:, :, at : at + values.shape[1]]
            beta = int(at > 0)
            torch.baddbmm(answer, share, values, beta=beta, alpha=step.rescale, out=answer)
            at += values.shape[1]
        step.of(answers).copy_(answer.view(*step.shape, -1))
    return out


class _Work(NamedTuple):
    """What is asked for, besides the tensors that have gradients."""

    masks: tuple[Tensor | None, ...]
    geometry: Geometry
    scale: float
    dropout_p: float
    draw: _Draw

    def blocks(
        self, query: Tensor, sides: tuple[Tensor | None, ...], front: Tensor | None = None
    ) -> Blocks:
        of_globals, sparse, tokens = (
            None if key is None or value is None or mask is None else Keys(key, value, mask)
            for key, value, mask in zip(sides[::2], sides[1::2], self.masks, strict=True)
        )
        assert of_globals is not None and tokens is not None
        return Blocks(
            query,
            of_globals,
            sparse,
            tokens,
            self.geometry,
            self.scale,
            self.dropout_p,
            front=front,
        )


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, work: _Work, query: Tensor, front: Tensor | None, *sides: Tensor | None
    ) -> Tensor:
        blocks = work.blocks(query, sides, front)
        out = _attend(blocks, work.draw)
        ctx.work, ctx.before = work, blocks.num_front
        ctx.save_for_backward(query, out, *sides)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        work, before = ctx.work, ctx.before
        query, out, *sides = ctx.saved_tensors
        out, given = out[:, :, before:], grad[:, :, before:]
        grads = [None if x is None else torch.zeros_like(x) for x in sides]
        of_query = memory_like(query, query.shape[2])
        for step in _steps(work.blocks(query, sides), work.draw):
            weights = step.weights()
            of_out = step.of(given).reshape(step.query.shape)
            mean = (of_out * step.of(out).reshape(of_out.shape)).sum(-1, keepdim=True)
            of_out = of_out * step.rescale
            value = step.values()
            of_scores = step.memory.of("products", weights, *weights.shape)
            torch.bmm(of_out, value.mT, out=of_scores)
            kept = weights
            if step.kept is not None:
                of_scores.mul_(step.kept)
                kept = step.kept.mul_(weights)
            # the windows of values and keys are used up, their memory takes the gradients
            _add(grads[1::2], step, torch.bmm(kept.mT, of_out, out=value))
            of_scores.sub_(mean).mul_(weights)
            answer = step.memory.of("answers", query, *step.query.shape)
            torch.baddbmm(answer, of_scores, step.key, beta=0, alpha=work.scale, out=answer)
            step.of(of_query).copy_(answer.view(*step.shape, -1))
            of_key = step.key
            torch.baddbmm(of_key, of_scores.mT, step.query, beta=0, alpha=work.scale, out=of_key)
            _add(grads[::2], step, of_key)
        return None, of_query, grad[:, :, :before] if before else None, *grads


class _Step(NamedTuple):
    """One piece: some heads and blocks, N in all.

    Attributes:
        query: (N, b, D).
        key: (N, keys, D), those that are seen before zeros that fill up a cache line of scores.
        scale: of the scores.
        kept: (N, b, keys), 1 for a probability that dropout keeps and 0 for others; None: no dropout.
        rescale: what the kept ones are multiplied with.
    """

    run: Run
    piece: Piece
    seen: Windows
    query: Tensor
    key: Tensor
    scale: float
    mask: Tensor | None
    causal: Tensor | None
    kept: Tensor | None
    rescale: float
    memory: Workspace

    @property
    def shape(self) -> tuple[int, int, int]:
        """(heads, blocks, b)."""
        return *self.piece.shape, self.run.queries

    def of(self, x: Tensor) -> Tensor:
        """Its queries of ``x`` (B, H, T, ...), as a view (heads, blocks, b, ...)."""
        return self.run.of(x)[self.piece]

    def weights(self) -> Tensor:
        """The softmax of the scores, (N, b, keys)."""
        query, key = self.query, self.key
        out = self.memory.of("scores", query, *query.shape[:2], key.shape[1])
        torch.baddbmm(out, query, key.mT, beta=0, alpha=self.scale, out=out)
        size = self.seen.size
        if self.mask is not None:
            out.view(*self.shape, -1)[..., :size].add_(self.mask)
        if self.causal is not None:
            out[..., :size].add_(self.causal)
        out[..., size:].fill_(-math.inf)
        return torch.softmax(out, dim=-1, out=out)

    def values(self) -> Tensor:
        """(N, keys, D)."""
        parts = self.seen.value(self.piece)
        return self.memory.gather("values", parts, self.key.shape[1]).flatten(0, 1)

    def value_parts(self) -> list[Tensor]:
        """The same in parts (N, n, D): those of the tokens, which are most, where they are."""
        *others, tokens = self.seen.value(self.piece)
        if 1 not in self.piece.shape:
            return [self.values()]  # windows that move with the head and the block are no one batch
        size = self.seen.size - tokens.shape[2]
        parts = (self.memory.gather("values", others, size), tokens)
        return [x.flatten(0, 1) for x in parts if x.shape[2]]


def _steps(blocks: Blocks, draw: _Draw) -> Iterator[_Step]:
    """All pieces, in the same order forward and backward: dropout is drawn piece by piece."""
    query = blocks.query
    dropout = _Dropout(blocks.dropout_p, draw.seed)
    with workspace() as memory:
        for run, seen, mask in runs(blocks):
            before = causal(run, seen.size, query) if blocks.geometry.is_causal else None
            asking, keys = run.of(query), _whole_lines(seen.size, query)
            for piece in pieces(query, run, keys, draw.most_bytes):
                some, kept = asking[piece].flatten(0, 1), None
                if dropout.rate:
                    kept = memory.of("kept", some, *some.shape[:2], keys)
                    dropout.draw(kept)
                yield _Step(
                    run,
                    piece,
                    seen,
                    some,
                    memory.gather("keys", seen.key(piece), keys).flatten(0, 1),
                    blocks.scale,
                    None if mask is None else piece.of(mask),
                    before,
                    kept,
                    dropout.rescale,
                    memory,
                )


def _whole_lines(size: int, like: Tensor) -> int:
    """``size`` numbers rounded up to whole cache lines of them."""
    of_line = LINE_BYTES // like.element_size()
    return -(-size // of_line) * of_line


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
    spans = [(of_sparse, window) for window in run.sparse] + [(of_tokens, run.local)]
    for grad, window in spans:
        assert grad is not None
        for part in _parts(window):
            piece.window(grad, part, run).add_(given[:, :, count : count + part.size])
            count += part.size


def _parts(window: Window) -> Iterator[Window]:
    """Parts of a window that do not overlap with those of the next block."""
    for start in range(0, window.size, window.stride):
        size = min(window.stride, window.size - start)
        yield Window(window.start + start, size, window.stride)
