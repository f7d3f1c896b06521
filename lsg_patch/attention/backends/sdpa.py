"""Windows of keys gathered block by block, and PyTorch's own attention over them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lsg_patch.attention.backends import products
from lsg_patch.attention.backends.pieces import cache_bytes, pieces, workspace
from lsg_patch.attention.backends.windows import causal, padding, places, runs, unfolded
from lsg_patch.attention.bias import BlockBias
from lsg_patch.attention.blocks import Blocks, memory_like
from lsg_patch.attention.compiling import is_compiling

# whose products of whole matrices are faster than the small tiles of the fused attention
HAS_BLAS = torch.backends.mkl.is_available()


def block_attention(blocks: Blocks) -> Tensor:
    """LSG attention of the tokens' queries, behind the front: (B, H, g + T, D), linear in T."""
    if blocks.query.device.type != "cpu" or is_compiling():
        return _at_once(blocks)
    needs_grad = blocks.needs_grad
    if products.can_run(blocks) and (needs_grad or HAS_BLAS):
        return products.block_attention(blocks)
    return _at_once(blocks) if needs_grad else _in_pieces(blocks)


def _at_once(blocks: Blocks) -> Tensor:
    """All windows gathered, and one call over them."""
    geometry, (batch, heads, length, width) = blocks.geometry, blocks.query.shape
    run = geometry.whole(length)
    padded = run.blocks * run.queries
    query = F.pad(blocks.query, (0, 0, 0, padded - length)).unflatten(2, (run.blocks, run.queries))
    key, value = (torch.cat(unfolded(blocks, run, name), dim=3) for name in ("key", "value"))
    added = padding(blocks, run)
    at, rows = places(blocks, run)
    if rows is not None:
        added = added + _bias_of(at, rows)
    added = added.expand(-1, heads, -1, -1, -1).flatten(0, 1)
    if geometry.is_causal:
        added = added + causal(run, key.shape[3], query)
    flat = F.scaled_dot_product_attention(
        query.flatten(0, 1),
        key.flatten(0, 1),
        value.flatten(0, 1),
        attn_mask=added,
        dropout_p=blocks.dropout_p,
        scale=blocks.scale,
    )
    return blocks.with_front(flat.view(batch, heads, padded, width)[:, :, :length])


def _in_pieces(blocks: Blocks) -> Tensor:
    """As many blocks at a time as a processor's cache holds, each with no more than it sees."""
    query, geometry, front = blocks.query, blocks.geometry, blocks.num_front
    out = memory_like(query, front + query.shape[2])
    if blocks.front is not None:
        out[:, :, :front] = blocks.front
    with workspace() as memory:
        for run, seen, mask in runs(blocks):
            at, rows = places(blocks, run)
            asking, answers = run.of(query), run.of(out[:, :, front:])
            before = causal(run, seen.size, query) if geometry.is_causal else None
            for piece in pieces(query, run, seen.size, cache_bytes()):
                added = None if mask is None else piece.of(mask)
                if rows is not None:
                    of_heads = BlockBias(rows.rows[piece.heads])
                    added = _sum(added, _bias_of([piece.of(x) for x in at], of_heads))
                answers[piece] = F.scaled_dot_product_attention(
                    asking[piece],
                    memory.gather("keys", seen.key(piece), seen.size),
                    memory.gather("values", seen.value(piece), seen.size),
                    attn_mask=_sum(added, before),
                    dropout_p=blocks.dropout_p,
                    scale=blocks.scale,
                )
    return out


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def _bias_of(at: list[Tensor], rows: BlockBias) -> Tensor:
    """The bias of keys at these places, parts that differ in more than their size where not shared."""
    parts = [rows.of(x) for x in at]
    shape = torch.broadcast_shapes(*(x.shape[:-1] for x in parts))
    return torch.cat([x.expand(*shape, -1) for x in parts], dim=-1)
