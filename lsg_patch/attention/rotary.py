"""Rotary positions: queries and keys are turned, so that their product knows how far apart they are."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """``x`` (B, H, N, D) with every pair of elements turned by the angle of its row.

    Args:
        rotation: cosines and sines, each (1 or B, N, D / 2).
        interleaved: neighbours are a pair; else an element and the one half a head after it.

    Source: Su et al., RoFormer (arXiv 2104.09864), section 3.2.2.
    """
    cos, sin = (part[:, None] for part in rotation)
    size = x.shape[-1] // 2
    pairs = x.unflatten(-1, (size, 2)) if interleaved else x.unflatten(-1, (2, size))
    of_pair = -1 if interleaved else -2
    first, second = pairs.unbind(of_pair)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.stack(turned, of_pair).flatten(-2).to(x.dtype)
