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
from torch.autograd.function import FunctionCtx, once_differentiable

from lsg_patch.attention.backends.windows import Buffer, Piece, Windows, pieces, windows
from lsg_patch.attention.geometry import Geometry, Run, Window
from lsg_patch.attention.keys import Keys, additive

# half precision would lose what the sums are made of
DTYPES = (torch.float32, torch.float64)
# bytes of the scores of a piece: they, what they are made of and what becomes of them stay in cache
CACHE_BYTES = 3 << 20


def block_attention(
    query: Tensor,
    global_keys: Keys,
    sparse: Keys | None,
    tokens: Keys,
    geometry: Geometry,
    dropout_p: float,
    scale: float,
) -> Tensor:
    """LSG attention of the tokens' queries (B, H, T, D), differentiable once."""
    seed = 0
    if dropout_p:
        # by the global random state, so that checkpointing and a seed of the user repeat it
        seed = int(torch.randint(2**62, (), dtype=torch.int64))
    masks = (global_keys.mask, None if sparse is None else sparse.mask, tokens.mask)
    sides = [x for keys in (global_keys, sparse, tokens) for x in (keys or (None, None))[:2]]
    work = _Work(masks, geometry, dropout_p, scale, seed)
    out: Tensor = _BlockAttention.apply(query, *sides, work)
    return out


class _Work(NamedTuple):
    masks: tuple[Tensor, Tensor | None, Tensor]
    geometry: Geometry
    dropout_p: float
    scale: float
    seed: int


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        global_key: Tensor,
        global_value: Tensor,
        sparse_key: Tensor | None,
        sparse_value: Tensor | None,
        token_key: Tensor,
        token_value: Tensor,
        work: _Work,
    ) -> Tensor:
        sides = (global_key, global_value, sparse_key, sparse_value, token_key, token_value)
        # laid out as (B, T, H, D), so that joining the heads afterwards copies nothing
        out = _like(query)
        most = query.new_empty(query.shape[:3])
        total = torch.empty_like(most)
        values = Buffer(query)
        for step in _steps(query, sides, work):
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
            step.of(out).copy_(answer.view(*step.shape, -1))
        ctx.save_for_backward(query, *sides, out, most, total)
        ctx.work = work
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, *sides, out, most, total = ctx.saved_tensors  # type: ignore[attr-defined]
        work: _Work = ctx.work  # type: ignore[attr-defined]
        grads = [None if x is None else torch.zeros_like(x) for x in sides]
        grad_query = _like(query)
        values, products = Buffer(query), Buffer(query)
        for step in _steps(query, sides, work):
            weights = step.scores()
            weights.sub_(step.of(most).reshape(*weights.shape[:2], 1)).exp_()
            # what a row of the softmax is divided by goes into its gradient, which is narrower
            inverse = step.of(total).reshape(*weights.shape[:2], 1).reciprocal()
            given = step.of(grad_out).reshape(*weights.shape[:2], -1) * inverse
            dot = (given * step.of(out).reshape(given.shape)).sum(-1, keepdim=True)
            given = given.mul_(step.rescale)
            value = values.gather(step.seen.value, step.piece).flatten(0, 1)
            of_weights = products.of(*weights.shape)
            torch.bmm(given, value.transpose(1, 2), out=of_weights)
            if step.kept is None:
                _add(grads[1::2], step, torch.bmm(weights.transpose(1, 2), given, out=value))
            else:
                of_weights.mul_(step.kept)
                kept = step.kept.mul_(weights)
                _add(grads[1::2], step, torch.bmm(kept.transpose(1, 2), given, out=value))
            of_scores = of_weights.sub_(dot).mul_(weights)
            of_query = torch.bmm(of_scores, step.key).mul_(work.scale)
            step.of(grad_query).copy_(of_query.view(*step.shape, -1))
            _add(grads[::2], step, torch.bmm(of_scores.transpose(1, 2), step.query, out=value))
        return grad_query, *grads, None


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


def _steps(query: Tensor, sides: Any, work: _Work) -> Iterator[_Step]:
    """All pieces, in the same order forward and backward: dropout is drawn piece by piece."""
    geometry = work.geometry
    of_globals, of_sparse, of_tokens = (
        None if mask is None else Keys(key, value, mask)
        for key, value, mask in zip(sides[::2], sides[1::2], work.masks, strict=True)
    )
    assert of_globals is not None and of_tokens is not None
    queries, keys, scores, kept = (Buffer(query) for _ in range(4))
    dropout = _Dropout(work.dropout_p, work.seed)
    batch, heads, length, width = query.shape
    for run in geometry.runs(length, 0 if of_sparse is None else of_sparse.key.shape[2]):
        seen = windows(of_globals, of_sparse, of_tokens, run)
        mask = None if bool(seen.seen.all()) else additive(seen.seen, query.dtype)
        causal = None
        if geometry.is_causal:
            causal = _causal(run.queries, seen.size, query)
        asking = run.of(query)
        size = seen.size * run.queries * query.element_size()
        for piece in pieces(batch, heads, run.blocks, max(1, CACHE_BYTES // size)):
            some = asking[piece]
            of_query = queries.of(*some.shape)
            torch.mul(some, work.scale, out=of_query)
            key = keys.gather(seen.key, piece).flatten(0, 1)
            count = len(key)
            yield _Step(
                run,
                piece,
                seen,
                of_query.flatten(0, 1),
                key,
                None if mask is None else piece.of(mask),
                causal,
                dropout.draw(kept.of(count, run.queries, seen.size)) if work.dropout_p else None,
                dropout.rescale,
                scores,
            )


class _Dropout:
    """Which probabilities are kept: 16 random bits for each of them, the same for the same seed.

    Four times as fast as a float for each, and as exact: a rate of 0.1 is one of 0.1 + 7e-6 at most.
    """

    def __init__(self, rate: float, seed: int) -> None:
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


def _like(x: Tensor) -> Tensor:
    """Memory for (B, H, T, D), laid out as (B, T, H, D)."""
    batch, heads, length, width = x.shape
    return x.new_empty(batch, length, heads, width).transpose(1, 2)


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
            first = part.start + (run.first + piece.blocks.start) * part.stride
            reach = (step.shape[1] - 1) * part.stride + part.size
            own = grad[piece.row, piece.heads].narrow(1, first, reach)
            target = own.unfold(1, part.size, part.stride).movedim(-1, 2)
            target.add_(given[:, :, count : count + part.size])
            count += part.size


def _parts(window: Window) -> Iterator[Window]:
    """Parts of a window that do not overlap with those of the next block."""
    for start in range(0, window.size, window.stride):
        size = min(window.stride, window.size - start)
        yield Window(window.start + start, size, window.stride)


def _causal(rows: int, columns: int, like: Tensor) -> Tensor:
    """What keeps queries from the keys after them in their own block, whose keys come last."""
    seen = torch.ones(rows, columns, dtype=torch.bool, device=like.device)
    return additive(seen.tril(columns - rows), like.dtype)
