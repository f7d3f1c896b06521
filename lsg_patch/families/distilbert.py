"""DistilBERT: other names, no token types, positions learned or of sinusoids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lsg_patch.families.base import AttentionNames, Family, continued


def projected(module: Any, hidden: Tensor, context: Tensor) -> Tensor:
    """The output projection, which DistilBERT's attention module holds."""
    output: Tensor = module.out_lin(context)
    return output


def interleaved_sinusoids(rows: Tensor, offset: int, length: int, config: Any) -> Tensor | None:
    """Where the table is not learned: sines in even columns, cosines in odd ones.

    Source: Vaswani et al., Attention Is All You Need, section 3.5.
    """
    if not config.sinusoidal_pos_embds:
        return None
    width = rows.shape[1]
    column = torch.arange(width, dtype=torch.float64)
    wavelength = 10000.0 ** (2 * (column // 2) / width)
    angle = torch.arange(length, dtype=torch.float64)[:, None] / wavelength
    return continued(rows, torch.where(column % 2 == 0, angle.sin(), angle.cos()))


DISTILBERT = Family(
    "distilbert",
    ("DistilBertModel",),
    attentions="transformer.layer.*.attention",
    stack="transformer",
    token_types=None,
    computed_positions=interleaved_sinusoids,
    names=AttentionNames(query="q_lin", key="k_lin", value="v_lin", heads="n_heads"),
    output=projected,
)

FAMILIES = (DISTILBERT,)
