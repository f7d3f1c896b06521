"""Windows of keys gathered block by block, and PyTorch's own fused attention over them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from lsg_patch.attention.bias import BlockBias, RelativeBias
from lsg_patch.attention.compiling import is_compiling
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
    bias: RelativeBias | None = None,
) -> Tensor:
    """LSG attention of the tokens' queries (B, H, T, D): linear in T, in time and in memory."""
    inputs = [query] + [x for keys in (global_keys, sparse, tokens) if keys for x in keys[:2]]
    inputs += [] if bias is None else [bias.table]
    keep_all = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    batch, heads, length, width = query.shape

    def attend(query: Tensor, key: list[Tensor], value: list[Tensor], added: Tensor) -> Tensor:
        """``query`` (n, blocks, b, D) over parts (n, blocks, size, D) of its keys and values.

        ``added`` (n, blocks, 1 or b, keys) is added to the scores.
        """
        if geometry.is_causal:
            # within its own block a query sees what stands before it
            rows, columns = query.shape[2], added.shape[-1]
            seen = torch.ones(rows, columns, dtype=torch.bool, device=query.device)
            added = added + additive(seen.tril(columns - rows), added.dtype)
        return F.scaled_dot_product_attention(
            query,
            torch.cat(key, dim=2),
            torch.cat(value, dim=2),
            attn_mask=added,
            dropout_p=dropout_p,
            scale=scale,
        )

    if query.device.type != "cpu" or keep_all or is_compiling():
        run = geometry.whole(length)
        padded = run.blocks * run.queries
        query = F.pad(query, (0, 0, 0, padded - length)).unflatten(2, (run.blocks, run.queries))
        key, value, mask = _windows(global_keys, sparse, tokens, run, query.dtype)
        places, rows = _places(bias, global_keys, sparse, geometry, run)
        flat = attend(
            query.flatten(0, 1),
            [x.flatten(0, 1) for x in key],
            [x.flatten(0, 1) for x in value],
            _with_bias(mask, places, rows).expand(-1, heads, -1, -1, -1).flatten(0, 1),
        )
        return flat.view(batch, heads, padded, width)[:, :, :length]

    # laid out as (B, T, H, D), so that joining the heads afterwards copies nothing
    out = query.new_empty(batch, length, heads, width).transpose(1, 2)
    for run in geometry.runs(length, 0 if sparse is None else sparse.key.shape[2]):
        key, value, mask = _windows(global_keys, sparse, tokens, run, query.dtype)
        places, rows = _places(bias, global_keys, sparse, geometry, run)
        start = run.first * geometry.block_size
        own = slice(start, start + run.blocks * run.queries)
        asking, answers = (
            x[:, :, own].unflatten(2, (run.blocks, run.queries)) for x in (query, out)
        )
        most = max(1, CACHE_BYTES // (2 * mask.shape[-1] * width * query.element_size()))
        for row, some, part in _pieces(batch, heads, run.blocks, most):
            answers[row, some, part] = attend(
                asking[row, some, part],
                [x[row, some, part] for x in key],
                [x[row, some, part] for x in value],
                _with_bias(
                    _piece(mask, row, some, part),
                    [_piece(x, row, some, part) for x in places],
                    None if rows is None else BlockBias(rows.rows[some]),
                ),
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
    for name in ("key", "value", "mask"):
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


def _places(
    bias: RelativeBias | None,
    global_keys: Keys,
    sparse: Keys | None,
    geometry: Geometry,
    run: Run,
) -> tuple[list[Tensor], BlockBias | None]:
    """How far the keys that a block sees stand behind its first query, and the bias of it.

    The places are in the parts of ``_windows``, each (1 or B, 1 or H, 1 or blocks, size): what is
    the same for all blocks is there once.
    """
    if bias is None:
        return [], None
    of_globals = bias.of_globals(global_keys.key.shape[2])
    device = of_globals.device
    block = torch.arange(run.first, run.first + run.blocks, device=device)[:, None]
    start = geometry.block_size * block
    places = [of_globals.unsqueeze(2) - start]
    if sparse is not None and sparse.positions is not None and run.sparse:
        found = unfold_windows(sparse.positions, run.sparse, run.blocks, 2, run.first)
        places += [x - start for x in found]
    elif sparse is not None:
        for window in run.sparse:
            index = torch.arange(window.start, window.start + window.size, device=device)
            places.append(geometry.run_positions(index)[None, None, None])
    token = torch.arange(run.local.start, run.local.start + run.local.size, device=device)
    return [*places, token[None, None, None]], bias.of_blocks(run.queries)


def _with_bias(mask: Tensor, places: list[Tensor], rows: BlockBias | None) -> Tensor:
    """``mask`` (..., blocks, 1, keys), and the bias of keys at these places if there is one."""
    return mask if rows is None else mask + _joined([rows.of(x) for x in places])


def _joined(parts: list[Tensor]) -> Tensor:
    """Parts (..., size) that differ in more than their size only where one of them is shared."""
    shape = torch.broadcast_shapes(*(x.shape[:-1] for x in parts))
    return torch.cat([x.expand(*shape, -1) for x in parts], dim=-1)


def _piece(x: Tensor, row: int, some: slice, part: slice) -> Tensor:
    """A piece of ``x`` (1 or B, 1 or H, 1 or blocks, ...); what is shared by all is whole in each."""
    everything = slice(None)
    return x[
        row if x.shape[0] > 1 else 0,
        some if x.shape[1] > 1 else everything,
        part if x.shape[2] > 1 else everything,
    ]


def _pieces(batch: int, heads: int, blocks: int, most: int) -> Iterator[tuple[int, slice, slice]]:
    """Slices of (batch, heads, blocks) of at most ``most`` blocks each, whole heads where they fit."""
    some_heads, some_blocks = max(1, most // max(1, blocks)), min(blocks, most)
    for row in range(batch):
        for head in range(0, heads, some_heads):
            for block in range(0, blocks, some_blocks):
                yield row, slice(head, head + some_heads), slice(block, block + some_blocks)
