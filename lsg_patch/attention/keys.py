"""Keys, their values and which of them are seen: what queries attend to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Keys(NamedTuple):
    """``key`` and ``value`` (B, H, n, D); ``mask`` (B, 1 or H, n), True where a key is seen."""

    key: Tensor
    value: Tensor
    mask: Tensor


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as what is added to scores: 0 where True, a large finite penalty elsewhere.

    Half of the least finite number: a row in which nothing is seen then stays finite in every
    dtype, where the least number itself would overflow to -inf and its softmax to NaN.
    """
    penalty = torch.finfo(dtype).min / 2
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, penalty)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (B, H, n) of ``x`` (B, H, T, D), as (B, H, n, D)."""
    batch, heads, length, width = x.shape
    # projections come as (B, T, H, D) in memory, where this reshape is free and a row one copy
    rows = x.transpose(1, 2).reshape(-1, width)
    b = torch.arange(batch, device=x.device)[:, None, None]
    h = torch.arange(heads, device=x.device)[:, None]
    flat = (b * length + index) * heads + h
    return rows.index_select(0, flat.flatten()).view(*flat.shape, width)
