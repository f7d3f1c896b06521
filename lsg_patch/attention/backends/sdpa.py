"""Windows of keys gathered block by block, and PyTorch's own fused attention over them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from lsg_patch.attention.bias import BlockBias, RelativeBias
from lsg_patch.attention.geometry import Geometry, unfold_windows
from lsg_patch.attention.keys import Keys, additive

# bytes of gathered keys that stay in a processor's cache until they are used
CACHE_BYTES = 8 << 20


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
    length = query.shape[2]
    blocks = geometry.num_blocks(length)
    query = F.pad(query, (0, 0, 0, blocks * geometry.block_size - length))
    query = query.unflatten(2, (blocks, geometry.block_size))
    key, value, mask = _windows(global_keys, sparse, tokens, geometry, blocks)

    causal = None
    if geometry.is_causal:
        # within its own block a query sees what stands before it
        causal = torch.ones(
            geometry.block_size, mask.shape[-1], dtype=torch.bool, device=query.device
        ).tril(mask.shape[-1] - geometry.block_size)
    places: list[Tensor] = []
    block_bias = None
    if bias is not None:
        places = _places(bias.of_globals(global_keys.key.shape[2]), sparse, geometry, blocks)
        block_bias = bias.of_blocks(geometry.block_size)

    def penalties(mask: Tensor, places: list[Tensor], block_bias: BlockBias | None) -> Tensor:
        """What is added to scores (..., blocks, b, keys): for ``mask`` (..., blocks, keys), and a bias."""
        seen = mask.unsqueeze(-2)
        added = None if block_bias is None else _joined([block_bias.of(x) for x in places])
        return additive(seen if causal is None else seen & causal, query.dtype, added)

    def attend(query: Tensor, key: list[Tensor], value: list[Tensor], attn_mask: Tensor) -> Tensor:
        """``query`` (n, blocks, b, D) over parts (n, blocks, size, D) of its keys and values."""
        return F.scaled_dot_product_attention(
            query,
            torch.cat(key, dim=2),
            torch.cat(value, dim=2),
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            scale=scale,
        )

    batch, heads, _, _, width = query.shape
    used = (query, *key, *value) if block_bias is None else (query, *key, *value, block_bias.rows)
    keep_all = torch.is_grad_enabled() and any(x.requires_grad for x in used)
    if query.device.type != "cpu" or keep_all or _is_compiling():
        mask = mask.expand(-1, heads, -1, -1)
        flat = attend(
            query.flatten(0, 1),
            [x.flatten(0, 1) for x in key],
            [x.flatten(0, 1) for x in value],
            penalties(mask, places, block_bias).flatten(0, 1),
        )
        return flat.view(batch, heads, blocks * geometry.block_size, width)[:, :, :length]

    # laid out as (B, T, H, D), so that joining the heads afterwards copies nothing
    out = query.new_empty(batch, blocks, geometry.block_size, heads, width).permute(0, 3, 1, 2, 4)
    block_bytes = 2 * mask.shape[-1] * width * query.element_size()
    for row, some, part in _pieces(batch, heads, blocks, max(1, CACHE_BYTES // block_bytes)):
        out[row, some, part] = attend(
            query[row, some, part],
            [x[row, some, part] for x in key],
            [x[row, some, part] for x in value],
            penalties(
                _piece(mask, row, some, part),
                [_piece(x, row, some, part) for x in places],
                None if block_bias is None else BlockBias(block_bias.rows[some]),
            ),
        )
    return out.flatten(2, 3)[:, :, :length]


def _windows(
    global_keys: Keys, sparse: Keys | None, tokens: Keys, geometry: Geometry, blocks: int
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The keys and values that each block sees, as parts (B, H, blocks, size, D), and their mask.

    The mask is (B, 1 or H, blocks, keys). The parts are views: the gathering is left to the one
    who uses them, piece by piece.
    """
    parts: list[list[Tensor]] = []
    for name in ("key", "value", "mask"):
        dim = 2
        found = [getattr(global_keys, name).unsqueeze(dim)]
        found[0] = found[0].expand(*found[0].shape[:dim], blocks, *found[0].shape[dim + 1 :])
        if sparse is not None:
            found += unfold_windows(getattr(sparse, name), geometry.sparse_windows, blocks, dim)
        found += unfold_windows(getattr(tokens, name), (geometry.local_window,), blocks, dim)
        parts.append(found)
    key, value, masks = parts
    heads = max(m.shape[1] for m in masks)
    return key, value, torch.cat([m.expand(-1, heads, -1, -1) for m in masks], dim=-1)


def _places(
    of_globals: Tensor, sparse: Keys | None, geometry: Geometry, blocks: int
) -> list[Tensor]:
    """How far the keys that a block sees stand behind its first query, in the parts of ``_windows``.

    ``of_globals`` (1 or B, 1, g) count from the first token. Each part is
    (1 or B, 1 or H, 1 or blocks, size): what is the same for all blocks is there once.
    """
    device = of_globals.device
    start = geometry.block_size * torch.arange(blocks, device=device)[:, None]
    places = [of_globals.unsqueeze(2) - start]
    windows = geometry.sparse_windows if sparse is not None else ()
    if sparse is not None and sparse.positions is not None:
        places += [x - start for x in unfold_windows(sparse.positions, windows, blocks, 2)]
    else:
        for window in windows:
            index = torch.arange(window.start, window.start + window.size, device=device)
            places.append(geometry.run_positions(index)[None, None, None])
    local = geometry.local_window
    token = torch.arange(local.start, local.start + local.size, device=device)
    return [*places, token[None, None, None]]


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


def _is_compiling() -> bool:
    """Whether this is being traced, where a loop over pieces would be unrolled."""
    is_compiling = getattr(torch.compiler, "is_compiling", None)  # torch 2.3 and later
    compiling = is_compiling() if is_compiling else torch._dynamo.is_compiling()
    return bool(compiling or torch._C._get_tracing_state())
