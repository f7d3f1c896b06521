"""Windows of keys gathered block by block, and PyTorch's own fused attention over them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from lsg_patch.attention.geometry import Geometry, Run, unfold_windows
from lsg_patch.attention.keys import Keys, additive

# bytes of gathered keys that stay in a processor's cache until they are used
CACHE_BYTES = 4 << 20


def block_attention(
    query: Tensor,
    global_keys: Keys,
    sparse: Keys | None,
    tokens: Keys,
    geometry: Geometry,
    dropout_p: float,
    scale: float,
) -> Tensor:
    """LSG attention of the tokens' queries (B, H, T, D): linear in T, in time and in memory."""
    inputs = [query] + [x for keys in (global_keys, sparse, tokens) if keys for x in keys[:2]]
    keep_all = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    batch, heads, length, width = query.shape

    def attend(query: Tensor, key: list[Tensor], value: list[Tensor], mask: Tensor) -> Tensor:
        """``query`` (n, blocks, b, D) over parts (n, blocks, size, D) of its keys and values.

        ``mask`` (n, blocks, 1, keys) is added to the scores.
        """
        if geometry.is_causal:
            # within its own block a query sees what stands before it
            rows, columns = query.shape[2], mask.shape[-1]
            seen = torch.ones(rows, columns, dtype=torch.bool, device=query.device)
            mask = mask + additive(seen.tril(columns - rows), mask.dtype)
        return F.scaled_dot_product_attention(
            query,
            torch.cat(key, dim=2),
            torch.cat(value, dim=2),
            attn_mask=mask,
            dropout_p=dropout_p,
            scale=scale,
        )

    if query.device.type != "cpu" or keep_all or _is_compiling():
        run = geometry.whole(length)
        padded = run.blocks * run.queries
        query = F.pad(query, (0, 0, 0, padded - length)).unflatten(2, (run.blocks, run.queries))
        key, value, mask = _windows(global_keys, sparse, tokens, run, query.dtype)
        flat = attend(
            query.flatten(0, 1),
            [x.flatten(0, 1) for x in key],
            [x.flatten(0, 1) for x in value],
            mask.expand(-1, heads, -1, -1, -1).flatten(0, 1),
        )
        return flat.view(batch, heads, padded, width)[:, :, :length]

    # laid out as (B, T, H, D), so that joining the heads afterwards copies nothing
    out = query.new_empty(batch, length, heads, width).transpose(1, 2)
    for run in geometry.runs(length, 0 if sparse is None else sparse.key.shape[2]):
        key, value, mask = _windows(global_keys, sparse, tokens, run, query.dtype)
        start = run.first * geometry.block_size
        rows = slice(start, start + run.blocks * run.queries)
        asking, answers = (
            x[:, :, rows].unflatten(2, (run.blocks, run.queries)) for x in (query, out)
        )
        most = max(1, CACHE_BYTES // (2 * mask.shape[-1] * width * query.element_size()))
        for row, some, part in _pieces(batch, heads, run.blocks, most):
            answers[row, some, part] = attend(
                asking[row, some, part],
                [x[row, some, part] for x in key],
                [x[row, some, part] for x in value],
                mask[row, some if mask.shape[1] == heads else slice(1), part],
            )
    return out


def _windows(
    global_keys: Keys, sparse: Keys | None, tokens: Keys, run: Run, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The keys and values that each block sees, as parts (B, H, blocks, size, D), and their mask.

    The mask, (B, 1 or H, blocks, 1, keys), is to be added to scores. The parts are views: the
    gathering is left to the one who uses them, piece by piece.
    """
    parts: list[list[Tensor]] = []
    for name in Keys._fields:
        dim = 2
        found = [getattr(global_keys, name).unsqueeze(dim)]
        found[0] = found[0].expand(*found[0].shape[:dim], run.blocks, *found[0].shape[dim + 1 :])
        if sparse is not None and run.sparse:
            found += unfold_windows(getattr(sparse, name), run.sparse, run.blocks, dim, run.first)
        found += unfold_windows(getattr(tokens, name), (run.local,), run.blocks, dim, run.first)
        parts.append(found)
    key, value, masks = parts
    heads = max(m.shape[1] for m in masks)
    seen = torch.cat([m.expand(-1, heads, -1, -1) for m in masks], dim=-1)
    return key, value, additive(seen, dtype).unsqueeze(-2)


def _pieces(batch: int, heads: int, blocks: int, most: int) -> Iterator[tuple[int, slice, slice]]:
    """Slices of (batch, heads, blocks) of at most ``most`` blocks each, whole heads where they fit."""
    some_heads, some_blocks = max(1, most // max(1, blocks)), min(blocks, most)
    for row in range(batch):
        for head in range(0, heads, some_heads):
            for block in range(0, blocks, some_blocks):
                yield row, slice(head, head + some_heads), slice(block, block + some_blocks)


def _is_compiling() -> bool:
    """Whether this is being traced, where a loop over pieces would be unrolled."""
    is_compiling = getattr(torch.compiler, "is_compiling", None)  # torch 2.3 and later
    compiling = is_compiling() if is_compiling else torch._dynamo.is_compiling()
    return bool(compiling or torch._C._get_tracing_state())
