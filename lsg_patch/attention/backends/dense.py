"""Every query against every key, with a mask: for short sequences, and to check the others."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lsg_patch.attention.bias import RelativeBias
from lsg_patch.attention.blocks import Blocks, Keys, additive
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
    attn_mask = bias
    if mask is not None or is_causal:
        n, m = query.shape[2], key.shape[2]
        seen = torch.ones(n if is_causal else 1, m, dtype=torch.bool, device=query.device)
        seen = seen.tril(m - n) if is_causal else seen
        seen = seen if mask is None else mask.unsqueeze(2) & seen
        attn_mask = additive(seen, query.dtype, bias)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, scale=scale
    )


def block_attention(blocks: Blocks) -> Tensor:
    """LSG attention of the tokens' queries, after the global output, by a (T, keys) mask: quadratic."""
    query, global_keys, sparse, tokens, geometry, *_ = blocks
    length, device = query.shape[2], query.device
    local = _seen(length, geometry, (geometry.local_window,), tokens.key.shape[2], device)
    if geometry.is_causal:
        local = local.tril()
    sides = [
        (global_keys, torch.ones(length, global_keys.key.shape[2], dtype=torch.bool, device=device))
    ]
    if sparse is not None:
        windows = geometry.sparse_windows
        sides.append((sparse, _seen(length, geometry, windows, sparse.key.shape[2], device)))
    sides.append((tokens, local))
    mask = torch.cat([keys.mask.unsqueeze(2) & seen for keys, seen in _same_heads(sides)], dim=-1)
    added = None
    if blocks.bias is not None:
        added = _bias(blocks.bias, global_keys.key.shape[2], sparse, length, geometry)
    out = F.scaled_dot_product_attention(
        query,
        torch.cat([keys.key for keys, _ in sides], dim=2),
        torch.cat([keys.value for keys, _ in sides], dim=2),
        attn_mask=additive(mask, query.dtype, added),
        dropout_p=blocks.dropout_p,
        scale=blocks.scale,
    )
    return blocks.joined(out)


def _seen(
    length: int,
    geometry: Geometry,
    windows: tuple[Window, ...],
    num_keys: int,
    device: torch.device,
) -> Tensor:
    """(T, num_keys): which keys the windows of each token's block hold."""
    block = torch.arange(length, device=device)[:, None] // geometry.block_size
    key = torch.arange(num_keys, device=device)
    seen = torch.zeros(length, num_keys, dtype=torch.bool, device=device)
    for window in windows:
        start = block * window.stride + window.start
        seen |= (key >= start) & (key < start + window.size)
    return seen


def _bias(
    bias: RelativeBias, num_global: int, sparse: Keys | None, length: int, geometry: Geometry
) -> Tensor:
    """(1 or B, H, T, keys): of all tokens' queries and all keys."""
    token = torch.arange(length, device=bias.table.device)
    positions = [bias.global_positions(num_global), token[None, None]]
    if sparse is not None:
        index = torch.arange(sparse.key.shape[2], device=token.device)
        means = geometry.sparse_positions(index)[None, None]
        positions.insert(1, means if sparse.positions is None else sparse.positions)
    shared = torch.broadcast_shapes(*(x.shape[:2] for x in positions))
    return bias.between(token[None], torch.cat([x.expand(*shared, -1) for x in positions], dim=-1))


def _same_heads(sides: list[tuple[Keys, Tensor]]) -> list[tuple[Keys, Tensor]]:
    heads = max(keys.mask.shape[1] for keys, _ in sides)
    return [(keys._replace(mask=keys.mask.expand(-1, heads, -1)), seen) for keys, seen in sides]
