"""Windows of keys gathered block by block, and PyTorch's own fused attention over them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lsg_patch.attention.backends import recomputed
from lsg_patch.attention.backends.windows import Buffer, Piece, pieces, places, windows
from lsg_patch.attention.bias import BlockBias, RelativeBias
from lsg_patch.attention.compiling import is_compiling
from lsg_patch.attention.geometry import Geometry
from lsg_patch.attention.keys import Keys, additive

# bytes of gathered keys that stay in a processor's cache until they are used
CACHE_BYTES = 3 << 20


def block_attention(
    query: Tensor,
    global_keys: Keys,
    sparse: Keys | None,
    tokens: Keys,
    geometry: Geometry,
    dropout_p: float,
    scale: float,
    bias: RelativeBias | None = None,
) -> Tensor:
    """LSG attention of the tokens' queries (B, H, T, D): linear in T, in time and in memory."""
    inputs = [query] + [x for keys in (global_keys, sparse, tokens) if keys for x in keys[:2]]
    inputs += [] if bias is None else [bias.table]
    keep_all = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    call = (query, global_keys, sparse, tokens, geometry, dropout_p, scale)
    if query.device.type != "cpu" or is_compiling():
        return _at_once(*call, bias)
    if not keep_all:
        return _in_pieces(*call, bias)
    if bias is None and query.dtype in recomputed.DTYPES:
        return recomputed.block_attention(*call)
    return _at_once(*call, bias)


def _at_once(
    query: Tensor,
    global_keys: Keys,
    sparse: Keys | None,
    tokens: Keys,
    geometry: Geometry,
    dropout_p: float,
    scale: float,
    bias: RelativeBias | None,
) -> Tensor:
    """All windows gathered, and one call over them."""
    batch, heads, length, width = query.shape
    run = geometry.whole(length)
    padded = run.blocks * run.queries
    query = F.pad(query, (0, 0, 0, padded - length)).unflatten(2, (run.blocks, run.queries))
    seen = windows(global_keys, sparse, tokens, run)
    added = additive(seen.seen, query.dtype)
    at, rows = places(bias, global_keys, sparse, geometry, run)
    if rows is not None:
        added = added + _bias_of(at, rows)
    added = added.expand(-1, heads, -1, -1, -1).flatten(0, 1)
    if geometry.is_causal:
        added = added + _causal(run.queries, seen.size, added)
    flat = F.scaled_dot_product_attention(
        query.flatten(0, 1),
        torch.cat(seen.key, dim=3).flatten(0, 1),
        torch.cat(seen.value, dim=3).flatten(0, 1),
        attn_mask=added,
        dropout_p=dropout_p,
        scale=scale,
    )
    return flat.view(batch, heads, padded, width)[:, :, :length]


def _in_pieces(
    query: Tensor,
    global_keys: Keys,
    sparse: Keys | None,
    tokens: Keys,
    geometry: Geometry,
    dropout_p: float,
    scale: float,
    bias: RelativeBias | None,
) -> Tensor:
    """As many blocks at a time as a processor's cache holds, each with no more than it sees."""
    batch, heads, length, width = query.shape
    # laid out as (B, T, H, D), so that joining the heads afterwards copies nothing
    out = query.new_empty(batch, length, heads, width).transpose(1, 2)
    keys, values = Buffer(query), Buffer(query)
    for run in geometry.runs(length, 0 if sparse is None else sparse.key.shape[2]):
        seen = windows(global_keys, sparse, tokens, run)
        at, rows = places(bias, global_keys, sparse, geometry, run)
        asking, answers = (run.of(x) for x in (query, out))
        mask = None if bool(seen.seen.all()) else additive(seen.seen, query.dtype)
        causal = None
        if geometry.is_causal:
            causal = _causal(run.queries, seen.size, query)
        most = max(1, CACHE_BYTES // (2 * seen.size * width * query.element_size()))
        for piece in pieces(batch, heads, run.blocks, most):
            added = None if mask is None else piece.of(mask)
            if rows is not None:
                of_heads = BlockBias(rows.rows[piece.heads])
                added = _sum(added, _bias_of([piece.of(x) for x in at], of_heads))
            answers[piece] = F.scaled_dot_product_attention(
                asking[piece],
                keys.gather(seen.key, piece),
                values.gather(seen.value, piece),
                attn_mask=_sum(added, causal),
                dropout_p=dropout_p,
                scale=scale,
            )
    return out


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def _causal(rows: int, columns: int, like: Tensor) -> Tensor:
    """What keeps queries from the keys after them in their own block, whose keys come last."""
    seen = torch.ones(rows, columns, dtype=torch.bool, device=like.device)
    return additive(seen.tril(columns - rows), like.dtype)


def _bias_of(at: list[Tensor], rows: BlockBias) -> Tensor:
    """The bias of keys at these places, parts that differ in more than their size where not shared."""
    parts = [rows.of(x) for x in at]
    shape = torch.broadcast_shapes(*(x.shape[:-1] for x in parts))
    return torch.cat([x.expand(*shape, -1) for x in parts], dim=-1)
