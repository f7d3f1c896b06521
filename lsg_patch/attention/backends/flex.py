"""PyTorch's FlexAttention over [tokens | sparse tokens | global tokens]: fused, nothing gathered.

Which tiles of keys a tile of queries looks at is a block mask, made from the geometry and kept;
what is padding in this very batch, a mask function reads from a tensor. Forward on CPU, forward and
backward on CUDA.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, lru_cache
from importlib.util import find_spec
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lsg_patch.attention.blocks import Blocks
from lsg_patch.attention.compiling import is_compiling
from lsg_patch.attention.geometry import Geometry, Window

# tiles that every one of flex's CUDA kernels divides, forward and backward
QUERY_TILE = 128
KEY_TILE = {"cuda": 128, "cpu": 64}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LEAST_WIDTH = 16  # of a head, for the matrix units of a GPU
LAST = torch.iinfo(torch.int32).max  # beyond every query


@cache
def missing() -> str | None:
    """Why this torch has no FlexAttention; None where it has it."""
    # looked for and not imported: that would bring half of torch's compiler along
    package = "torch.nn.attention"
    if find_spec(package) and find_spec(f"{package}.flex_attention"):
        return None
    return f"this torch has no {package}.flex_attention (2.5 and later have it)"


def why_not(blocks: Blocks) -> str | None:
    """Why FlexAttention, which is not ``missing``, cannot run this; None where it can."""
    device, dtype = blocks.query.device.type, blocks.query.dtype
    if is_compiling():
        return "it is compiled by itself, not inside another torch.compile, export or trace"
    if device not in KEY_TILE:
        return f"it runs on cuda and cpu, not on {device}"
    if dtype not in DTYPES:
        return f"it computes in float32, float16 and bfloat16, not in {dtype}"
    if blocks.bias is not None:
        return "it adds no bias by distance to the scores"
    if blocks.dropout_p:
        return f"it has no dropout, and dropout_p is {blocks.dropout_p}"
    if blocks.needs_grad and device == "cpu":
        return "it has no backward on a CPU; torch.no_grad() asks for none"
    return None


def block_attention(blocks: Blocks) -> Tensor:
    """LSG attention of the tokens' queries, after the global output: (B, H, g + T, D). No window is copied.

    Raises:
        ValueError: FlexAttention cannot run this; the message says why.
    """
    reason = why_not(blocks)
    if reason is not None:
        raise ValueError(
            f"backend='flex' cannot run here: {reason}; 'auto' and 'sdpa' run anywhere"
        )
    query, global_keys, sparse, tokens, geometry, scale, *_ = blocks
    _, heads, length, width = query.shape
    num_global = global_keys.key.shape[2]
    plan = plan_of(geometry, geometry.num_blocks(length), num_global, query.device)

    parts = [tokens, *([] if sparse is None else [sparse]), global_keys]
    key, value, mask = (
        _filled_up([getattr(keys, name) for keys in parts], plan.sizes, heads)
        for name in ("key", "value", "mask")
    )
    block_mask = copy.copy(plan.block_mask)
    block_mask.mask_mod = _mask_function(mask, plan.begin, plan.end)

    rest = plan.query_tiles * QUERY_TILE - length
    query = F.pad(query, (0, 0, 0, rest)) if rest else query
    if width < LEAST_WIDTH:
        query, key, value = (F.pad(x, (0, LEAST_WIDTH - width)) for x in (query, key, value))
    if not torch.is_grad_enabled():
        query = query.detach()  # on CPU flex refuses whatever could have a gradient
    run = compiled(query.device, query.dtype, heads, query.shape[3], scale)
    out = run(query, key, value, block_mask, scale)
    return blocks.joined(out[:, :, :length, :width])


def _filled_up(parts: list[Tensor], sizes: tuple[int, ...], heads: int) -> Tensor:
    """Parts (B, 1 or H, n, ...) side by side, each filled up with zeros (False) to its size."""
    pieces = []
    for x, size in zip(parts, sizes, strict=True):
        x = x.expand(-1, heads, *x.shape[2:])
        pieces += [x, x.new_zeros(*x.shape[:2], size - x.shape[2], *x.shape[3:])]
    return torch.cat(pieces, dim=2)


# --- which tiles see which: from the geometry alone, for all batches ------------------------------


class Plan(NamedTuple):
    """How keys lie side by side and who sees them, for one geometry and number of blocks.

    Attributes:
        sizes: keys of each part, filled up to whole tiles.
        query_tiles: tiles of queries.
        begin, end: (2, keys): the queries of two ranges [begin, end) see a key.
        block_mask: which tiles of keys a tile of queries looks at; without a mask function.
    """

    sizes: tuple[int, ...]
    query_tiles: int
    begin: Tensor
    end: Tensor
    block_mask: Any


@lru_cache(maxsize=32)
def plan_of(geometry: Geometry, blocks: int, num_global: int, device: torch.device) -> Plan:
    """The plan for ``blocks`` blocks of tokens, their sparse tokens and the global ones."""
    tile, length = KEY_TILE[device.type], blocks * geometry.block_size
    parts: list[tuple[int, tuple[Window, ...]]] = [(length, (geometry.local_window,))]
    if geometry.has_sparse:
        parts.append((blocks * geometry.sparse_per_block, geometry.sparse_windows))
    parts.append((num_global, ()))
    # two tiles at least: torch compiles anew for a size of one
    sizes = [-(-count // tile) * tile for count, _ in parts]
    sizes[0] = max(sizes[0], 2 * tile)
    query_tiles = max(2, -(-length // QUERY_TILE))
    if sum(sizes) == query_tiles * QUERY_TILE:
        # torch would take keys and queries for the same size, and compile for that case alone (or,
        # on a CPU with torch 2.13, write code that is none)
        sizes[-1] += tile

    # tensors made in inference mode could not be saved for a backward later
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        # what fills a tile up is seen by nobody
        begin = torch.full((2, sum(sizes)), LAST)
        end = torch.zeros_like(begin)
        at = 0
        for (count, windows), size in zip(parts, sizes, strict=True):
            for i, window in enumerate(windows):
                first, last = window.blocks_that_see(torch.arange(count))
                begin[i, at : at + count] = first * geometry.block_size
                end[i, at : at + count] = (last + 1) * geometry.block_size
            at += size
        if geometry.is_causal:
            # within its own block a query sees the tokens before it
            begin[0, :length] = begin[0, :length].maximum(torch.arange(length))
        of_global = slice(at - sizes[-1], at - sizes[-1] + num_global)
        begin[0, of_global], end[0, of_global] = 0, LAST
        return Plan(
            tuple(sizes),
            query_tiles,
            begin.int().to(device),
            end.int().to(device),
            _block_mask(begin, end, query_tiles, tile, device),
        )


def _block_mask(
    begin: Tensor, end: Tensor, query_tiles: int, tile: int, device: torch.device
) -> Any:
    """Flex's own form of a table (query tiles, key tiles): how many each row has, which ones first.

    Its size is that of one entry for each pair of tiles: no pair of tokens is looked at.
    """
    from torch.nn.attention.flex_attention import BlockMask

    first = torch.arange(query_tiles)[:, None] * QUERY_TILE
    begin, end = (x.unflatten(1, (-1, tile)).unsqueeze(1) for x in (begin, end))
    table = ((begin.amin(-1) < first + QUERY_TILE) & (end.amax(-1) > first)).any(dim=0)
    indices = torch.argsort(table.int(), dim=1, descending=True, stable=True).int()
    number = table.sum(dim=1).int()
    return BlockMask.from_kv_blocks(
        number[None, None].to(device), indices[None, None].to(device), BLOCK_SIZE=(QUERY_TILE, tile)
    )


def _mask_function(mask: Tensor, begin: Tensor, end: Tensor) -> Callable[..., Tensor]:
    """For flex: is key ``kv`` seen by query ``q``. ``mask`` is (B, H, keys)."""

    def seen(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        one = (begin[0, kv] <= q) & (q < end[0, kv])
        other = (begin[1, kv] <= q) & (q < end[1, kv])
        return mask[b, h, kv] & (one | other)

    return seen


# --- compiled once for each configuration, and for all lengths ------------------------------------


@lru_cache(maxsize=64)
def compiled(
    device: torch.device, dtype: torch.dtype, heads: int, width: int, scale: float
) -> Callable[..., Tensor]:
    """FlexAttention, compiled for all that does not change from batch to batch, at its first call."""
    # torch counts compilations by code object, and gives up after a few: each has its own
    own = FunctionType(_attend.__code__.replace(), _attend.__globals__)
    # the whole graph, or an error: uncompiled flex is quadratic
    return torch.compile(own, dynamic=True, fullgraph=True)


def _attend(query: Tensor, key: Tensor, value: Tensor, block_mask: Any, scale: float) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(query, key, value, block_mask=block_mask, scale=scale)
