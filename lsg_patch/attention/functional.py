"""LSG attention as one function: local, sparse and global keys under one softmax."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lsg_patch.attention.backends import dense, flex, sdpa
from lsg_patch.attention.bias import RelativeBias
from lsg_patch.attention.blocks import Blocks, Keys, joined
from lsg_patch.attention.compiling import is_compiling, is_exporting
from lsg_patch.attention.geometry import Geometry, check_bool, check_int
from lsg_patch.attention.sparsity import (
    SPARSITY_TYPES,
    SelectionInputs,
    draw_projections,
    projection_shapes,
    select,
)

BACKENDS: dict[str, Callable[[Blocks], Tensor]] = {
    "auto": sdpa.block_attention,  # flex is taken where it is asked for
    "dense": dense.block_attention,
    "sdpa": sdpa.block_attention,
    "flex": flex.block_attention,
}


def check_backend(name: str) -> None:
    """Whether there is a backend of that name, here.

    Raises:
        ValueError: there is none, or this torch lacks what it needs.
    """
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {name!r}")
    reason = flex.missing() if name == "flex" else None
    if reason is not None:
        raise ValueError(f"backend={name!r} cannot run here: {reason}; pass 'auto' or 'sdpa'")


def make_geometry(
    block_size: int,
    sparse_block_size: int | None,
    sparsity_factor: int | None,
    sparsity_type: str | None,
    is_causal: bool = False,
) -> Geometry:
    """The geometry of these settings; 0, None and "none" switch the sparse part off.

    Raises:
        ValueError: a size is negative or not divisible by the factor, or the type is unknown.
    """
    is_name = isinstance(sparsity_type, str) and sparsity_type in SPARSITY_TYPES
    if sparsity_type is not None and not is_name:
        raise ValueError(
            f"sparsity_type must be one of {', '.join(SPARSITY_TYPES)}, not {sparsity_type!r}"
        )
    # checked also where the part is off: a negative size is never meant
    size = 0 if sparse_block_size is None else sparse_block_size
    factor = 0 if sparsity_factor is None else sparsity_factor
    for name, value in (("sparse_block_size", size), ("sparsity_factor", factor)):
        check_int(name, value, 0)
    off = sparsity_type in (None, "none") or not size or not factor
    return Geometry(block_size, 0 if off else size, factor or 1, is_causal)


def lsg_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding_mask: Tensor | None = None,
    *,
    block_size: int = 128,
    sparse_block_size: int | None = 128,
    sparsity_factor: int | None = 2,
    sparsity_type: str | None = "norm",
    num_global_tokens: int = 0,
    first_token_global: bool = False,
    is_causal: bool = False,
    lsh_num_pre_rounds: int = 1,
    lsh_projections: Sequence[Tensor] | None = None,
    seed: int | None = None,
    choose_by: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    relative_bias: RelativeBias | None = None,
    backend: str = "auto",
) -> Tensor:
    """Local + sparse + global attention, linear in the sequence length.

    The first ``num_global_tokens`` rows are global: they see everything and are seen by all. The
    ``T`` rows after them see the global rows, their own block of ``block_size`` tokens and its
    neighbours, and up to ``sparse_block_size`` sparse tokens on each side of these, one for every
    ``sparsity_factor`` tokens. Up to ``2 * block_size`` tokens everything sees everything.

    Args:
        query: (B, H, N, D) with N = num_global_tokens + T, the global rows first.
        key: of the same shape.
        value: of the same shape.
        padding_mask: (B, T) over the rows that are not global; True or 1 where a token is seen.
            None: all are seen. The contents of masked rows change nothing, as long as their scores are
            finite. bos_pooling weighs by the first row's query, which must then be a real token's.
        block_size: tokens a block, a multiple of ``sparsity_factor``.
        sparse_block_size: sparse tokens seen on each side, a multiple of ``sparsity_factor``;
            0 or None: no sparse part.
        sparsity_type: norm, pooling, lsh, stride, block_stride, bos_pooling or none.
        first_token_global: for sequences without global rows: token 0 is seen by all and sees all
            (as in the reference's stand-alone layers), whatever the mask says of it. It stays in
            its place.
        is_causal: a token sees only the tokens before it. The global rows then see each other
            only, and the sparse tokens of the left side are seen. Then ``key`` and ``value`` may have
            more rows than ``query``, those of earlier tokens: (B, H, num_global_tokens
            + P + T, D) and a mask (B, P + T), the queries being the last T; everything before a token
            is seen by it.
        lsh_num_pre_rounds: for "lsh": rounds before the last one.
        lsh_projections: for "lsh": the projections of all rounds, (H, D, hashes) each.
        seed: for "lsh": what projections are drawn from that are not given (None is seed 0). The global
            random state is neither read nor changed.
        choose_by: (B, H, N, D), what norm and lsh choose tokens by in place of the keys, such as keys
            before they were turned by their positions. None: the keys.
        dropout_p: of the attention probabilities.
        scale: of the scores; ``D ** -0.5`` by default.
        relative_bias: what is added to the scaled scores by the distance of key and query. With
            ``num_global_tokens`` it needs their positions.
        backend: for more than two blocks of tokens: "dense" (quadratic), "sdpa" (anywhere), "flex"
            (compiled at its first call; no dropout, and forward alone on a CPU), or "auto": "sdpa".

    Returns:
        (B, H, N, D), in the dtype of autocast where it is on. Rows that see no key at all are finite and
        arbitrary. Beyond two blocks it is differentiable once; transforms of torch.func work.

    Raises:
        ValueError: a shape, a size or a name does not fit; the message names the argument. Or the
            ``backend`` asked for cannot run this; the message says why.

    Source: Condevaux & Harispe, arXiv 2210.15497.
    """
    geometry = make_geometry(
        block_size, sparse_block_size, sparsity_factor, sparsity_type, is_causal
    )
    for name, flag in (("is_causal", is_causal), ("first_token_global", first_token_global)):
        check_bool(name, flag)
    _check_numbers(dropout_p, scale)
    _check_tensors(query, key, value, padding_mask, num_global_tokens, is_causal)
    query, key, value = (_as_autocast(x) for x in (query, key, value))
    for name, x in (("key", key), ("value", value)):
        if (x.dtype, x.device) != (query.dtype, query.device):
            raise ValueError(
                f"{name} is {x.dtype} on {x.device}, query {query.dtype} on {query.device}: "
                "they must be alike"
            )
    if choose_by is not None:
        _check_floats("choose_by", choose_by)
        if choose_by.shape != query.shape:
            raise ValueError(
                f"choose_by must have the shape of query, {tuple(query.shape)}, not "
                f"{tuple(choose_by.shape)}"
            )
    if relative_bias is not None:
        _check_bias(relative_bias, key, num_global_tokens)
        relative_bias = relative_bias._replace(table=relative_bias.table.to(query.dtype))
    check_backend(backend)
    if first_token_global and num_global_tokens:
        raise ValueError(
            "first_token_global=True needs num_global_tokens=0: there is one or the other"
        )
    if sparsity_type == "lsh":
        shapes = projection_shapes(geometry, query.shape[1], query.shape[3], lsh_num_pre_rounds)
        if lsh_projections is None:
            lsh_projections = draw_projections(shapes, seed)
        given: object = lsh_projections
        if isinstance(lsh_projections, (list, tuple)):
            given = [tuple(getattr(projection, "shape", ())) for projection in lsh_projections]
        if shapes and given != shapes:
            raise ValueError(f"lsh_projections must be of the shapes {shapes}, not {given}")
    settings = _Settings(
        geometry=geometry,
        sparsity_type=sparsity_type or "none",
        projections=lsh_projections or (),
        dropout_p=dropout_p,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        backend=backend,
        bias=relative_bias,
        choose_by=choose_by,
    )
    mask = None
    if padding_mask is not None:
        mask = seen_by(padding_mask, "padding_mask").expand(query.shape[0], -1)
    if first_token_global:
        return _with_first_token_global(query, key, value, mask, settings)
    return _attention(query, key, value, mask, mask, num_global_tokens, settings)


def _as_autocast(x: Tensor) -> Tensor:
    """``x`` as ``scaled_dot_product_attention`` would take it: in the dtype of autocast, where it is on."""
    device = x.device.type
    if hasattr(torch, "get_autocast_dtype"):  # torch 2.4 and later
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return x
        dtype = torch.get_autocast_dtype(device)
    elif device == "cpu":
        dtype = torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else x.dtype
    else:
        dtype = torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else x.dtype
    return x if x.dtype == torch.float64 else x.to(dtype)


class _Settings(NamedTuple):
    geometry: Geometry
    sparsity_type: str
    projections: Sequence[Tensor]
    dropout_p: float
    scale: float
    backend: str
    bias: RelativeBias | None
    choose_by: Tensor | None


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    selectable: Tensor | None,
    num_global: int,
    settings: _Settings,
) -> Tensor:
    """Attention of (B, H, N, D); ``selectable`` (B, T) are the tokens that selections may use."""
    geometry, dropout_p, scale = settings.geometry, settings.dropout_p, settings.scale
    bias, rows = settings.bias, key.shape[2]
    has_kept_keys = rows > query.shape[2]
    seen = None if mask is None else F.pad(mask, (num_global, 0), value=True).unsqueeze(1)
    # what is exported serves all lengths, so it takes the way that is right for all
    is_short = has_kept_keys or (not is_exporting() and rows - num_global <= geometry.full_length)
    if is_short and not geometry.is_causal:
        added = bias and bias.between_rows(rows, slice(None), slice(None))
        return dense.full_attention(query, key, value, seen, dropout_p, scale, bias=added)
    global_query, token_query = _split(query, num_global)
    global_output = None
    if num_global:
        # a global token that saw the tokens would carry the future to those before
        visible = slice(num_global if geometry.is_causal else None)
        global_output = dense.full_attention(
            global_query,
            key[:, :, visible],
            value[:, :, visible],
            None if seen is None else seen[:, :, visible],
            dropout_p,
            scale,
            bias=bias and bias.between_rows(rows, slice(num_global), visible),
        )
    if is_short:
        out = _full_causal_attention(token_query, key, value, seen, settings)
        return out if global_output is None else joined(global_output, out)
    if seen is None:
        seen = query.new_ones(query.shape[0], 1, rows, dtype=torch.bool)
    parts = (_split(x, num_global) for x in (key, value, seen))
    global_keys, tokens = (Keys(*part) for part in zip(*parts, strict=True))
    sparse = None
    if geometry.has_sparse:
        chosen_from = tokens
        if selectable is not None:
            chosen_from = tokens._replace(mask=selectable.unsqueeze(1))
        inputs = SelectionInputs(
            chosen_from,
            geometry,
            token_query[:, :, 0],
            scale,
            settings.projections,
            tokens.key if settings.choose_by is None else settings.choose_by[:, :, num_global:],
            # sparse tokens are more than a block away
            with_positions=bias is not None and bias.reach > geometry.block_size,
        )
        sparse = select(settings.sparsity_type, inputs)
    blocks = Blocks(
        token_query, global_keys, sparse, tokens, geometry, scale, dropout_p, bias, global_output
    )
    return BACKENDS[settings.backend](blocks)


def _split(x: Tensor, num_global: int) -> tuple[Tensor, Tensor]:
    """Rows of global tokens and of the others of ``x`` (B, H, N, ...).

    Not sliced: the gradient of each slice would be a whole tensor, zeros for the most part.
    """
    of_globals, of_tokens = x.split((num_global, x.shape[2] - num_global), dim=2)
    return of_globals, of_tokens


def _full_causal_attention(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, settings: _Settings
) -> Tensor:
    """``query`` (B, H, n, D), the last of the (B, H, m, D) rows, over the rows before each.

    Taken in parts, so that no mask is (n, m): many queries may meet many earlier keys.
    """
    before, size, parts = key.shape[2] - query.shape[2], settings.geometry.full_length, []
    for start in range(0, max(1, query.shape[2]), size):
        part = query[:, :, start : start + size]
        end = before + start + part.shape[2]
        mask = None if seen is None else seen[:, :, :end]
        keys, values = key[:, :, :end], value[:, :, :end]
        rows = slice(before + start, end)
        bias = settings.bias and settings.bias.between_rows(key.shape[2], rows, slice(end))
        parts.append(
            dense.full_attention(
                part, keys, values, mask, settings.dropout_p, settings.scale, True, bias
            )
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _with_first_token_global(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, settings: _Settings
) -> Tensor:
    """Token 0 as a global token before all others, and masked at its own position."""
    length = key.shape[2]
    mask = query.new_ones(query.shape[0], length, dtype=torch.bool) if mask is None else mask

    def doubled(x: Tensor) -> Tensor:
        return torch.cat([x[:, :, :1], x], dim=2)

    query, key, value = doubled(query), doubled(key), doubled(value)
    if settings.choose_by is not None:
        settings = settings._replace(choose_by=doubled(settings.choose_by))
    elsewhere = mask & (torch.arange(length, device=query.device) > 0)
    # weighted pooling uses the first token's query, and counts that token at its own position
    factor, weighing = settings.geometry.sparsity_factor, ["bos_pooling"]
    if factor == settings.geometry.sparse_block_size:
        weighing.append("lsh")  # of one bucket: the same
    weighs = settings.sparsity_type in weighing and factor > 1
    if settings.bias is not None:
        positions = settings.bias.positions
        if positions is None:
            positions = torch.arange(length, device=query.device)[None]
        positions = torch.cat([positions[:, :1], positions], dim=1)
        settings = settings._replace(bias=settings.bias._replace(positions=positions))
    out = _attention(query, key, value, elsewhere, mask if weighs else elsewhere, 1, settings)
    if settings.geometry.is_causal:
        return out[:, :, 1:]
    return torch.cat([out[:, :, :1], out[:, :, 2:]], dim=2)


def _check_floats(name: str, x: object) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = f"{x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a tensor of floating point numbers, not {kind}")


def _check_numbers(dropout_p: object, scale: object) -> None:
    if not isinstance(dropout_p, (int, float)) or not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be a number from 0 to 1, not {dropout_p!r}")
    if scale is not None and not (isinstance(scale, (int, float)) and math.isfinite(scale)):
        raise ValueError(f"scale must be a finite number or None, not {scale!r}")


def seen_by(mask: Tensor, name: str) -> Tensor:
    """A padding mask, 0 where a token is hidden, as booleans.

    Raises:
        ValueError: it is one to be added to scores, 0 where a token is seen.
    """
    can_look = mask.is_floating_point() and not is_compiling() and not mask.is_meta
    if can_look and not bool((mask >= 0).all()):
        raise ValueError(
            f"{name} must be 1 for tokens and 0 for padding, and has {mask.min().item()}: a mask that is "
            "added to scores says it the other way round; pass (mask == 0)"
        )
    return mask.to(torch.bool)


def _check_bias(bias: RelativeBias, key: Tensor, num_global: int) -> None:
    batch, heads, rows, _ = key.shape
    if not isinstance(bias, RelativeBias):
        raise ValueError(f"relative_bias must be a RelativeBias, not {type(bias).__name__}")
    table, positions = bias
    _check_floats("relative_bias.table", table)
    if table.dim() != 2 or table.shape[0] != heads or table.shape[1] % 2 == 0:
        raise ValueError(
            f"relative_bias.table must be (H, 2 * m + 1) with H = {heads}, not of shape "
            f"{tuple(table.shape)}"
        )
    if positions is None and num_global:
        raise ValueError(
            f"relative_bias.positions is needed with num_global_tokens={num_global}: pass those of all rows"
        )
    if positions is not None and (
        not isinstance(positions, Tensor) or positions.is_floating_point()
    ):
        raise ValueError("relative_bias.positions must be a tensor of whole numbers")
    if positions is not None and positions.shape not in ((1, rows), (batch, rows)):
        raise ValueError(
            f"relative_bias.positions must be (B, N) = {(batch, rows)}, or (1, N), not of shape "
            f"{tuple(positions.shape)}"
        )


def _check_tensors(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding_mask: Tensor | None,
    num_global: int,
    is_causal: bool,
) -> None:
    check_int("num_global_tokens", num_global, 0)
    for name, x in (("query", query), ("key", key), ("value", value)):
        _check_floats(name, x)
    if query.dim() != 4 or 0 in (query.shape[1], query.shape[3]):
        raise ValueError(f"query must be (B, H, N, D), not of shape {tuple(query.shape)}")
    batch, heads, rows, width = query.shape
    if is_causal and key.dim() == 4:
        rows = max(rows, key.shape[2])  # those of earlier tokens come with them
    for name, x in (("key", key), ("value", value)):
        if x.shape != (batch, heads, rows, width):
            raise ValueError(
                f"{name} must have the shape of query, {tuple(query.shape)}, not {tuple(x.shape)}; "
                "only with is_causal=True may there be more keys and values, of earlier tokens"
            )
    if not 0 <= num_global <= query.shape[2]:
        raise ValueError(
            f"num_global_tokens={num_global} must be from 0 to the {query.shape[2]} rows of query"
        )
    if padding_mask is None:
        return
    if not isinstance(padding_mask, Tensor):
        raise ValueError(f"padding_mask must be a tensor, not {type(padding_mask).__name__}")
    fits = padding_mask.dim() == 2 and padding_mask.shape[0] in (1, batch)
    if not fits or padding_mask.shape[1] != rows - num_global:
        raise ValueError(
            f"padding_mask must be (B, T) = {(batch, rows - num_global)}: one entry for each row that "
            f"is not global, not of shape {tuple(padding_mask.shape)}"
        )
