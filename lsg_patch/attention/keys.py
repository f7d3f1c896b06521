"""Keys, their values and which of them are seen: what queries attend to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Keys(NamedTuple):
    """``key`` and ``value`` (B, H, n, D); ``mask`` (B, 1 or H, n), True where a key is seen.

    ``positions`` (1 or B, 1 or H, n) are where the keys stand among the tokens, if that is asked for
    and does not follow from their index.
    """

    key: Tensor
    value: Tensor
    mask: Tensor
    positions: Tensor | None = None


def additive(mask: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """A boolean mask as what is added to scores: ``bias`` (or 0) where True, a penalty elsewhere.

    It is half of the least finite number: a row in which nothing is seen then stays finite in every
    dtype, where the least number itself would overflow to -inf and its softmax to NaN.
    """
    penalty = torch.finfo(dtype).min / 2
    if bias is not None:
        return bias.masked_fill(~mask, penalty)
    return torch.zeros((), dtype=dtype, device=mask.device).masked_fill(~mask, penalty)


def take_rows(index: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Rows ``index`` (B, H, n) of each of the ``tensors`` (B, H, T, D), as (B, H, n, D)."""
    batch, heads, length, width = tensors[0].shape
    b = torch.arange(batch, device=index.device)[:, None, None]
    h = torch.arange(heads, device=index.device)[:, None]
    flat = ((b * length + index) * heads + h).flatten()
    # projections come as (B, T, H, D) in memory, where this reshape is free and a row one copy
    rows = (x.transpose(1, 2).reshape(-1, width) for x in tensors)
    return tuple(x.index_select(0, flat).view(*index.shape, width) for x in rows)
