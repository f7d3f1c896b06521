"""Whole matrix products, a cache-sized piece at a time: the scores of a piece are all that there is.

No score is kept for a backward, each piece is computed again there. Source: Dao et al.,
"FlashAttention" (arXiv 2205.14135), appendix B.2, with the windows of LSG in place of all keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsg_patch.attention.backends.pieces import Piece, Workspace, cache_bytes, pieces
from lsg_patch.attention.blocks import Blocks, Keys, memory_like
from lsg_patch.attention.geometry import Geometry, unfold_windows

# half precision would lose what the sums are made of
DTYPES = (torch.float32, torch.float64)
# rows of scores begin at whole cache lines: a product of 641 keys takes longer than one of 656
LINE_BYTES = 64


def can_run(blocks: Blocks) -> bool:
    return blocks.bias is None and blocks.query.dtype in DTYPES


def block_attention(blocks: Blocks) -> Tensor:
    """LSG attention of the tokens' queries, after the global output: (B, H, g + T, D).

    Differentiable once.
    """
    most_bytes, seed = cache_bytes(blocks.dropout_p > 0), 0
    if blocks.dropout_p:
        # by the global random state, so that checkpointing and a seed of the user repeat it
        seed = int(torch.randint(2**62, (), dtype=torch.int64, device="cpu"))
    if not blocks.needs_grad:
        return _attend(blocks, most_bytes, seed)
    out: Tensor = _BlockAttention.apply(
        blocks, most_bytes, seed, blocks.global_output, *blocks.tensors
    )
    return out


def _attend(blocks: Blocks, most_bytes: int, seed: int) -> Tensor:
    out, tokens_out = blocks.new_output()
    for step in _steps(blocks, most_bytes, seed):
        probabilities = step.probabilities()
        if step.dropout_mask is not None:
            probabilities.mul_(step.dropout_mask)
        output, count = step.like_query("output"), 0
        for value in step.value_parts():
            share = probabilities[:, :, count : count + value.shape[1]]
            beta = int(count > 0)
            torch.baddbmm(output, share, value, beta=beta, alpha=step.rescale, out=output)
            count += value.shape[1]
        step.write(output, tokens_out)
    return out


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, blocks: Blocks, most_bytes: int, seed: int, *inputs: Tensor | None
    ) -> Tensor:
        out = _attend(blocks, most_bytes, seed)
        _, *tensors = inputs  # the first is the global output, here for its gradient alone
        # tensors are saved by autograd alone, which watches over them
        nothing = [out.new_empty(0)] * len(tensors)
        ctx.blocks = blocks._replace(global_output=None).with_tensors(*nothing)
        ctx.cut, ctx.num_global = (most_bytes, seed), blocks.num_global
        ctx.save_for_backward(out, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, *tensors = ctx.saved_tensors
        blocks, num_global = ctx.blocks.with_tensors(*tensors), ctx.num_global
        out, grad_out = out[:, :, num_global:], grad[:, :, num_global:]
        grad_query = memory_like(blocks.query, blocks.query.shape[2])
        grads = [None if x is None else torch.zeros_like(x) for x in tensors[1:]]
        for step in _steps(blocks, *ctx.cut):
            probabilities, value = step.probabilities(), step.values()
            grad_output = step.read(grad_out)
            mean = (grad_output * step.read(out)).sum(-1, keepdim=True)
            grad_output = grad_output * step.rescale
            grad_scores = step.memory.of("grad_scores", value, *probabilities.shape)
            torch.bmm(grad_output, value.mT, out=grad_scores)
            dropped = probabilities
            if step.dropout_mask is not None:
                grad_scores.mul_(step.dropout_mask)
                dropped = step.dropout_mask.mul_(probabilities)
            # the memory of the values, and then of the keys, takes their gradients
            step.add_to(grads[1::2], torch.bmm(dropped.mT, grad_output, out=value))
            grad_scores.sub_(mean).mul_(probabilities)
            output, key, scale = step.like_query("output"), step.key, blocks.scale
            torch.baddbmm(output, grad_scores, key, beta=0, alpha=scale, out=output)
            step.write(output, grad_query)
            torch.baddbmm(key, grad_scores.mT, step.query, beta=0, alpha=scale, out=key)
            step.add_to(grads[::2], key)
        grad_global = grad[:, :, :num_global] if num_global else None
        return None, None, None, grad_global, grad_query, *grads


def as_operation(blocks: Blocks) -> Tensor:
    """``block_attention`` as one operation of a compiled graph, without a gradient."""
    sparse = () if blocks.sparse is None else blocks.sparse[:3]
    keys = [list(of[:3]) for of in (blocks.global_keys, sparse, blocks.tokens)]
    settings = list(map(int, astuple(blocks.geometry)))
    out: Tensor = torch.ops.lsg_patch.block_attention(
        blocks.query, *keys, blocks.global_output, settings, blocks.scale
    )
    return out


def _run_operation(
    query: Tensor,
    global_keys: list[Tensor],
    sparse: list[Tensor],
    tokens: list[Tensor],
    global_output: Tensor | None,
    geometry: list[int],
    scale: float,
) -> Tensor:
    block_size, sparse_block_size, factor, is_causal = geometry
    shape = Geometry(block_size, sparse_block_size, factor, bool(is_causal))
    keys = (Keys(*global_keys), Keys(*sparse) if sparse else None, Keys(*tokens))
    return block_attention(Blocks(query, *keys, shape, scale, global_output=global_output))


def _shape_operation(query: Tensor, *keys: Any) -> Tensor:
    global_output = keys[3]
    num_global = 0 if global_output is None else global_output.shape[2]
    return memory_like(query, num_global + query.shape[2])


if hasattr(torch.library, "custom_op"):  # torch 2.4 and later
    torch.library.custom_op(
        "lsg_patch::block_attention",
        _run_operation,
        mutates_args=(),
        schema="(Tensor query, Tensor[] global_keys, Tensor[] sparse, Tensor[] tokens, "
        "Tensor? global_output, int[] geometry, float scale) -> Tensor",
    ).register_fake(_shape_operation)


class _Step(NamedTuple):
    """One piece, its N = rows * heads * blocks as one batch of products.

    Attributes:
        query: (N, b, D).
        key: (N, keys, D), those that are seen before zeros that fill up a cache line of scores.
        dropout_mask: (N, b, keys), 1 for a probability that stays and 0 for others; None: no dropout.
        rescale: what those that stay are multiplied with.
    """

    piece: Piece
    query: Tensor
    key: Tensor
    dropout_mask: Tensor | None
    rescale: float
    memory: Workspace

    def like_query(self, role: str) -> Tensor:
        return self.memory.of(role, self.query, *self.query.shape)

    def read(self, x: Tensor) -> Tensor:
        """Its queries of ``x`` (B, H, T, D), as (N, b, D)."""
        return self.piece.part(x).reshape(self.query.shape)

    def write(self, x: Tensor, out: Tensor) -> None:
        """Writes ``x`` (N, b, D) where its queries are in ``out`` (B, H, T, D)."""
        self.piece.part(out).copy_(x.view(*self.piece.shape, -1))

    def probabilities(self) -> Tensor:
        """The softmax of the scores, (N, b, keys)."""
        query, key, piece = self.query, self.key, self.piece
        out = self.memory.of("scores", query, *query.shape[:2], key.shape[1])
        torch.baddbmm(out, query, key.mT, beta=0, alpha=piece.blocks.scale, out=out)
        added = piece.added()
        if added is not None:
            out.view(*piece.shape, -1)[..., : piece.num_keys].add_(added)
        out[..., piece.num_keys :].fill_(-math.inf)
        return torch.softmax(out, dim=-1, out=out)

    def values(self) -> Tensor:
        """(N, keys, D)."""
        return self.memory.gather("values", self.piece.windows("value"), self.key.shape[1])

    def value_parts(self) -> list[Tensor]:
        """The same in parts (N, n, D): those of the tokens, which are most, where they are."""
        *others, tokens = self.piece.windows("value")
        if sum(size > 1 for size in self.piece.shape[:3]) > 1:
            return [self.values()]  # windows that move in two dimensions are no one batch
        if not others:
            return [tokens.flatten(0, 2)]
        size = self.piece.num_keys - tokens.shape[3]
        return [self.memory.gather("values", others, size), tokens.flatten(0, 2)]

    def add_to(self, grads: list[Tensor | None], given: Tensor) -> None:
        """Adds ``given`` (N, keys, D) to the gradients of the global, sparse and token rows it is of."""
        piece, run = self.piece, self.piece.run
        given = given.view(*piece.shape[:3], *given.shape[1:])
        grad_globals, grad_sparse, grad_tokens = (
            None if x is None else x[piece.rows, piece.heads] for x in grads
        )
        assert grad_globals is not None
        count = grad_globals.shape[2]
        grad_globals.add_(given[:, :, :, :count].sum(2))
        for grad, windows in ((grad_sparse, run.sparse), (grad_tokens, (run.local,))):
            if grad is None or not windows:
                continue
            views = unfold_windows(grad, windows, run.num_blocks, 2, run.first_block)
            for window, view in zip(windows, views, strict=True):
                # windows of neighbouring blocks overlap, parts of a stride do not
                for part in view.split(window.stride, dim=3):
                    part.add_(given[:, :, :, count : count + part.shape[3]])
                    count += part.shape[3]


def _steps(blocks: Blocks, most_bytes: int, seed: int) -> Iterator[_Step]:
    """All pieces, in the same order forward and backward: dropout is drawn piece by piece."""
    dropout, memory = _Dropout(blocks.dropout_p, seed), Workspace()
    of_line = LINE_BYTES // blocks.query.element_size()
    for piece in pieces(blocks, most_bytes):
        query = piece.query.flatten(0, 2)
        num_keys = -(-piece.num_keys // of_line) * of_line
        dropout_mask = None
        if dropout.rate:
            dropout_mask = dropout.draw(memory.of("dropout", query, *query.shape[:2], num_keys))
        key = memory.gather("keys", piece.windows("key"), num_keys)
        yield _Step(piece, query, key, dropout_mask, dropout.rescale, memory)


class _Dropout:
    """Which probabilities stay: 16 random bits for each of them, the same for the same seed.

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
            self._bits = torch.empty(words, dtype=torch.int64, device="cpu")
        bits = self._bits[:words].random_(-(2**63), None, generator=self._generator)
        out.copy_(bits.view(torch.int16)[: out.numel()].view(out.shape))
        return torch.ge(out, self._least, out=out)
