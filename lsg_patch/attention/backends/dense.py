"""Every query against every key, with a mask: for short sequences, and to check the others."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lsg_patch.attention.bias import RelativeBias
from lsg_patch.attention.blocks import Blocks, additive, joined_masks
from lsg_patch.attention.geometry import Geometry, Window


def full_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    scale: float,
    is_causal: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """Softmax attention of ``query`` (B, H, n, D) over ``key`` and ``value`` (B, H, m, D).

    ``mask`` (B, 1 or H, m) is True where a key is seen, None where all are. With ``is_causal`` the
    last query is aligned with the last key. ``bias`` (1 or B, H, n, m) is added to the scores.
    """
    seen = None if mask is None else mask.unsqueeze(2)
    if is_causal:
        n, m = query.shape[2], key.shape[2]
        before = torch.ones(n, m, dtype=torch.bool, device=query.device).tril(m - n)
        seen = before if seen is None else seen & before
    attn_mask = bias if seen is None else additive(seen, query.dtype, bias)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, scale=scale
    )


def block_attention(blocks: Blocks) -> Tensor:
    """LSG attention of the tokens' queries, after the global output, by a (T, keys) mask: quadratic."""
    query, global_keys, sparse, tokens, geometry, *_ = blocks
    length = query.shape[2]
    sides = [(global_keys, torch.ones(length, 1, dtype=torch.bool, device=query.device))]
    if sparse is not None:
        sides.append((sparse, _seen(sparse.mask, length, geometry, geometry.sparse_windows)))
    local = _seen(tokens.mask, length, geometry, (geometry.local_window,))
    sides.append((tokens, local.tril() if geometry.is_causal else local))
    mask = joined_masks([keys.mask.unsqueeze(2) & seen for keys, seen in sides])
    bias = blocks.bias and _bias(blocks.bias, blocks)
    out = F.scaled_dot_product_attention(
        query,
        torch.cat([keys.key for keys, _ in sides], dim=2),
        torch.cat([keys.value for keys, _ in sides], dim=2),
        attn_mask=additive(mask, query.dtype, bias),
        dropout_p=blocks.dropout_p,
        scale=blocks.scale,
    )
    return blocks.joined(out)


def _seen(mask: Tensor, length: int, geometry: Geometry, windows: tuple[Window, ...]) -> Tensor:
    """(T, n): which keys, those of ``mask`` (B, 1 or H, n), the windows of each token's block hold."""
    num_keys, device = mask.shape[2], mask.device
    block = torch.arange(length, device=device)[:, None] // geometry.block_size
    key = torch.arange(num_keys, device=device)
    seen = torch.zeros(length, num_keys, dtype=torch.bool, device=device)
    for window in windows:
        start = block * window.stride + window.start
        seen |= (key >= start) & (key < start + window.size)
    return seen


def _bias(bias: RelativeBias, blocks: Blocks) -> Tensor:
    """(1 or B, H, T, keys): of all tokens' queries and all keys."""
    sparse = blocks.sparse
    token = torch.arange(blocks.query.shape[2], device=bias.table.device)
    positions = [bias.global_positions(blocks.global_keys.key.shape[2]), token[None, None]]
    if sparse is not None:
        index = torch.arange(sparse.key.shape[2], device=token.device)
        means = blocks.geometry.sparse_positions(index)[None, None]
        positions.insert(1, means if sparse.positions is None else sparse.positions)
    shared = torch.broadcast_shapes(*(x.shape[:2] for x in positions))
    return bias.between(token[None], torch.cat([x.expand(*shared, -1) for x in positions], dim=-1))
