"""The selections: which sparse tokens represent the far part of a sequence.

Each takes the tokens of a sequence and gives one sparse token for ``sparsity_factor`` tokens, in
token order. A sparse token is seen when a token behind it is seen, whatever the dtype: padding
never becomes visible.

Source: Condevaux & Harispe (arXiv 2210.15497), section 3.2, and its reference implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lsg_patch.attention.blocks import Keys, additive
from lsg_patch.attention.compiling import is_compiling, is_exporting, is_transformed
from lsg_patch.attention.geometry import Geometry, check_int

MOST_ROUNDS, MOST_SEED = 64, 1 << 62


class SelectionInputs(NamedTuple):
    """What a selection may look at.

    ``tokens`` has (B, H, T, D) keys with a (B, 1, T) mask; ``first_query`` (B, H, D) is the first
    token's query; ``projections`` are those of ``draw_projections``; ``choose_by`` (B, H, T, D) has
    what tokens are chosen by. ``with_positions``: the keys are to have their positions, unless these
    are ``Geometry.sparse_positions``.
    """

    tokens: Keys
    geometry: Geometry
    first_query: Tensor
    scale: float
    projections: Sequence[Tensor]
    choose_by: Tensor
    with_positions: bool = False


def select(sparsity_type: str, inputs: SelectionInputs) -> Keys:
    """The sparse tokens of a sequence: (B, H, n, D) keys and values with a (B, 1 or H, n) mask."""
    if inputs.geometry.sparsity_factor == 1:
        return inputs.tokens
    return SELECTIONS[sparsity_type](inputs)


def _missing(inputs: SelectionInputs) -> int:
    """Tokens that a last block lacks."""
    length, geometry = inputs.tokens.key.shape[2], inputs.geometry
    return geometry.num_blocks(length) * geometry.block_size - length


def _padded(inputs: SelectionInputs) -> SelectionInputs:
    """The same with whole blocks of tokens: hidden zeros at the end."""
    missing = _missing(inputs)
    if not is_compiling() and not missing:
        return inputs

    def padded(x: Tensor) -> Tensor:
        # as (B, T, H, D), the order in memory
        return F.pad(x.transpose(1, 2), (0, 0, 0, 0, 0, missing)).transpose(1, 2)

    key, value, mask, _ = inputs.tokens
    tokens = Keys(padded(key), padded(value), F.pad(mask, (0, missing)))
    choose_by = tokens.key if inputs.choose_by is key else padded(inputs.choose_by)
    return inputs._replace(tokens=tokens, choose_by=choose_by)


def _norm(inputs: SelectionInputs) -> Keys:
    """The tokens that are longest in each chunk, the earlier one first among equals."""
    tokens, geometry, *_ = inputs
    count = geometry.chunk // geometry.sparsity_factor
    key, missing = inputs.choose_by.detach(), _missing(inputs)
    # as (B, T, H, D), the order in memory: five times as fast
    norm = torch.linalg.vector_norm(key.transpose(1, 2), dim=-1, dtype=_wide(key.dtype))
    norm = norm.transpose(1, 2).masked_fill(~tokens.mask, -1.0)
    norm = F.pad(norm, (0, missing), value=-1.0).unflatten(2, (-1, geometry.chunk))
    # hidden tokens at the end of a sequence are then at the end here as well, where windows leave them out
    in_order = geometry.cuts_chunks or (not is_compiling() and missing > 0)
    order = _longest(norm, count, in_order)
    order = order.flip(-1) if geometry.cuts_chunks else order
    index = order + geometry.chunk * torch.arange(order.shape[2], device=key.device)[:, None]
    return _take(inputs, index.flatten(2))


def _longest(norm: Tensor, count: int, in_order: bool) -> Tensor:
    """Indices (..., count) of the greatest of ``norm`` (..., n), among equals of the earlier ones.

    ``in_order``: the greatest first; else in any order, which takes half of the time.
    """
    if is_exporting():  # ONNX knows neither bits nor a stable sort: how many come before each
        own, other = norm.unsqueeze(-1), norm.unsqueeze(-2)
        earlier = torch.ones(norm.shape[-1:] * 2, dtype=torch.bool, device=norm.device).tril(-1)
        before = ((other > own) | ((other == own) & earlier)).sum(-1)
        return before.topk(count, dim=-1, largest=False).indices
    # other devices may not rank such integers, and transforms do not read bits (torch 2.1)
    by_bits = norm.device.type in ("cpu", "cuda") and not is_transformed()
    if norm.dtype != torch.float32 or not by_bits:
        return norm.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    # the bits of a float that is not negative, read as an integer, are in its order
    earlier = torch.arange(norm.shape[-1] - 1, -1, -1, device=norm.device)
    ranks = (norm.view(torch.int32).long() << 32) + earlier
    return ranks.topk(count, dim=-1, sorted=in_order).indices


def _stride(inputs: SelectionInputs) -> Keys:
    """Every ``sparsity_factor``-th token; each head begins at another one."""
    tokens, geometry, *_ = inputs
    factor = geometry.sparsity_factor
    heads, length = tokens.key.shape[1:3]
    offset = torch.arange(heads, device=tokens.key.device) % factor
    runs = torch.arange(0, length + _missing(inputs), factor, device=offset.device)
    index = offset[:, None] + runs
    return _take(inputs, index.expand(tokens.key.shape[0], -1, -1))


def _block_stride(inputs: SelectionInputs) -> Keys:
    """A run of tokens in each block; each head takes the next run, around the block's end."""
    tokens, geometry, *_ = inputs
    heads, length = tokens.key.shape[1:3]
    device = tokens.key.device
    run = torch.arange(geometry.sparse_per_block, device=device)
    run = run + geometry.sparse_per_block * torch.arange(heads, device=device)[:, None]
    start = torch.arange(0, length, geometry.block_size, device=device)
    index = (run % geometry.block_size)[:, None, :] + start[:, None]
    return _take(inputs, index.flatten(1).expand(tokens.key.shape[0], -1, -1))


def _pooling(inputs: SelectionInputs) -> Keys:
    """The mean of the seen tokens of each run of ``sparsity_factor``."""
    tokens, geometry, *_ = _padded(inputs)
    seen = tokens.mask.unflatten(2, (-1, geometry.sparsity_factor))
    weights = seen.to(_wide(tokens.key.dtype))
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
    return _pool(tokens, weights, seen)


def _bos_pooling(inputs: SelectionInputs) -> Keys:
    """The mean of each run of ``sparsity_factor`` tokens, weighed by the first token's attention."""
    tokens, geometry, first_query, scale, *_ = _padded(inputs)
    wide = _wide(tokens.key.dtype)
    with torch.autocast(tokens.key.device.type, enabled=False):
        query, key = (first_query * scale).unsqueeze(-2), tokens.key.transpose(-1, -2)
        # half precision has no room for the products of long vectors
        scores = (query.to(wide) @ key.to(wide)).squeeze(-2)
    scores = scores + additive(tokens.mask, scores.dtype)
    weights = scores.unflatten(2, (-1, geometry.sparsity_factor)).softmax(-1)
    seen = tokens.mask.unflatten(2, (-1, geometry.sparsity_factor))
    return _pool(tokens, weights, seen)


def _lsh(inputs: SelectionInputs) -> Keys:
    """The means of tokens whose keys fall into the same bucket of random projections.

    The buckets of one round are the tokens of the next. A hash is linear up to the choice of its
    bucket, so sums of hashed tokens are hashed sums: only the last buckets are ever filled.
    """
    if inputs.geometry.sparsity_factor == inputs.geometry.sparse_block_size:
        return _bos_pooling(inputs)
    inputs = _padded(inputs)
    tokens, geometry = inputs.tokens, inputs.geometry
    dtype = tokens.key.dtype
    wide = _wide(dtype)
    chunked = (-1, geometry.chunk)
    seen = tokens.mask.unflatten(2, chunked)
    with torch.autocast(tokens.key.device.type, enabled=False):
        key = inputs.choose_by.detach().to(wide)
        buckets = None
        sizes = _round_sizes(geometry, len(inputs.projections))
        for size, projection in zip(sizes, inputs.projections, strict=True):
            hashed = key @ projection.to(key)
            if buckets is None:
                bucket = _bucket(hashed.unflatten(2, chunked))
            else:
                bucket = _bucket(buckets.sums(hashed)).gather(-1, buckets.bucket)
            buckets = _Buckets(bucket, seen, size)
        assert buckets is not None
        ones = torch.ones((), dtype=wide, device=key.device)
        count = buckets.sums(ones.expand(*key.shape[:3], 1))
        key, value = (
            (buckets.sums(x.to(wide)) / count.clamp(min=1)).flatten(2, 3).to(dtype)
            for x in (tokens.key, tokens.value)
        )
        positions = None
        if inputs.with_positions:
            place = torch.arange(seen.shape[2] * geometry.chunk, device=key.device).unsqueeze(-1)
            start = geometry.chunk * torch.arange(seen.shape[2], device=key.device)[:, None]
            within = (place % geometry.chunk).to(wide).expand(*key.shape[:2], -1, -1)
            mean = (buckets.sums(within) // count.clamp(min=1)).squeeze(-1)
            positions = (mean.long() + start).flatten(2)
    return Keys(key, value, (count.squeeze(-1) > 0).flatten(2), positions)


class _Buckets(NamedTuple):
    """Which of ``size`` buckets each token falls into, ``bucket`` (B, H, chunks, chunk).

    ``seen`` (B, 1, chunks, chunk): a token that is not seen is in none.
    """

    bucket: Tensor
    seen: Tensor
    size: int

    def sums(self, x: Tensor) -> Tensor:
        """The sums of ``x`` (B, H, T, n) in each bucket, (B, H, chunks, size, n)."""
        # a GPU is made for products, and a graph has no memory to add to
        if x.device.type == "cpu" and not is_compiling():
            return self._added(x)
        seen = self.seen.to(x.dtype).expand(self.bucket.shape)
        # scattered: converting booleans would take longer than all the rest
        members = seen.new_zeros(*seen.shape[:-1], self.size, seen.shape[-1])
        members = members.scatter(-2, self.bucket.unsqueeze(-2), seen.unsqueeze(-2))
        chunks: Tensor = x.unflatten(2, tuple(self.bucket.shape[2:]))
        return members @ chunks

    def _added(self, x: Tensor) -> Tensor:
        """Row by row, in the order of memory: few numbers are touched, where a product multiplies zeros."""
        *chunks, width = *self.bucket.shape[:3], x.shape[3]
        first = (self.size + 1) * torch.arange(self.bucket[..., 0].numel(), device=x.device)
        first = first.view(*chunks, 1)
        row = first + self.bucket.where(self.seen, self.size)  # a bucket more, for what is not seen
        out = x.new_zeros(self.bucket[..., 0].numel() * (self.size + 1), width)
        rows = row.flatten(2).transpose(1, 2).flatten()
        out.index_add_(0, rows, x.transpose(1, 2).flatten(0, 2))
        return out.view(*chunks, self.size + 1, width)[..., : self.size, :]


SELECTIONS: dict[str, Callable[[SelectionInputs], Keys]] = {
    "norm": _norm,
    "pooling": _pooling,
    "lsh": _lsh,
    "stride": _stride,
    "block_stride": _block_stride,
    "bos_pooling": _bos_pooling,
}
SPARSITY_TYPES = (*SELECTIONS, "none")


def projection_shapes(
    geometry: Geometry, heads: int, head_size: int, num_pre_rounds: int
) -> list[tuple[int, int, int]]:
    """Shapes (H, D, hashes) of the random projections of ``lsh``, one a round, the last round last.

    Raises:
        ValueError: ``num_pre_rounds``, the argument lsh_num_pre_rounds, is no number of rounds.
    """
    check_int("lsh_num_pre_rounds", num_pre_rounds, 0, MOST_ROUNDS)
    if not geometry.has_sparse or geometry.sparsity_factor in (1, geometry.sparse_block_size):
        return []
    return [(heads, head_size, size // 2) for size in _round_sizes(geometry, num_pre_rounds + 1)]


def draw_projections(
    shapes: Sequence[tuple[int, int, int]], seed: int | None
) -> tuple[Tensor, ...]:
    """Standard normal projections of the given shapes, on the CPU and in float32.

    They are drawn from ``seed`` (None is seed 0): the global random state is left alone.
    """
    seed = 0 if seed is None else seed
    check_int("seed", seed, 0, 2 * MOST_SEED - 1)  # each layer's is larger than the one before
    # the same for all that torch.func maps over
    with torch._C._DisableFuncTorch():
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(shape, generator=generator, device="cpu") for shape in shapes)


def _round_sizes(geometry: Geometry, rounds: int) -> list[int]:
    return [geometry.chunk] * (rounds - 1) + [geometry.chunk // geometry.sparsity_factor]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in: half precision is too coarse, and too short, for them."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _bucket(hashed: Tensor) -> Tensor:
    """The bucket (...) of hashed keys (..., hashes): two to a hash, the sign tells which."""
    hashes = hashed.shape[-1]
    if hashes == 0:
        return torch.zeros(hashed.shape[:-1], dtype=torch.long, device=hashed.device)
    bucket = hashed.abs().argmax(-1)
    return bucket + hashes * (hashed.gather(-1, bucket.unsqueeze(-1)).squeeze(-1) < 0)


def _pool(tokens: Keys, weights: Tensor, seen: Tensor) -> Keys:
    """Weighted sums of runs of tokens: ``weights`` (B, 1 or H, runs, factor)."""

    def pooled(x: Tensor) -> Tensor:
        # one pass over slices: a product of tiny matrices for each run is many times slower
        factor, wide = weights.shape[-1], weights.dtype
        total = x[:, :, ::factor].to(wide) * weights[..., :1]
        for i in range(1, factor):
            total.addcmul_(x[:, :, i::factor].to(wide), weights[..., i : i + 1])
        return total.to(x.dtype)

    return Keys(pooled(tokens.key), pooled(tokens.value), seen.any(-1))


def _take(inputs: SelectionInputs, index: Tensor) -> Keys:
    """The tokens of this ``index`` (B, H, n), which may be beyond the last one: hidden then."""
    tokens = inputs.tokens
    batch, heads, length, width = tokens.key.shape
    mask = F.pad(tokens.mask, (0, _missing(inputs))).expand(-1, heads, -1).gather(2, index)
    b = torch.arange(batch, device=index.device)[:, None, None]
    h = torch.arange(heads, device=index.device)[:, None]
    row = ((b * length + index.clamp(max=length - 1)) * heads + h).flatten()
    # projections come as (B, T, H, D) in memory, where this reshape is free and a row one copy
    key, value = (
        x.transpose(1, 2).reshape(-1, width).index_select(0, row).view(*index.shape, width)
        for x in (tokens.key, tokens.value)
    )
    return Keys(key, value, mask, index if inputs.with_positions else None)
