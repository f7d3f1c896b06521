"""Families whose attention modules project the joined heads themselves: ALBERT, DistilBERT, MPNet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lsg_patch.families.base import AttentionNames, Family, Projection, after_padding_row, continued
from lsg_patch.offloading import device_of


def to_normed_output(module: Any, hidden: Tensor, context: Tensor) -> Tensor:
    """Output projection, dropout, residual and norm, which ALBERT's attention module holds."""
    normed: Tensor = module.LayerNorm(hidden + module.output_dropout(module.dense(context)))
    return normed


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


# tokens farther away than this share one bucket of the table
LARGEST_DISTANCE = 128


def bias_by_distance(stack: Any) -> Tensor:
    """MPNet's own buckets of all distances, looked up in its table."""
    table = stack.relative_attention_bias
    distance = torch.arange(-LARGEST_DISTANCE, LARGEST_DISTANCE + 1, device=device_of(table))
    bias: Tensor = table(stack.relative_position_bucket(distance)).T
    return bias


FAMILIES = (
    # a group's layer runs several times and is swapped once; the stack itself widens the embeddings
    Family(
        "albert",
        ("AlbertModel",),
        attentions="encoder.albert_layer_groups.*.albert_layers.*.attention",
        names=AttentionNames(dropout="attention_dropout"),
        output=to_normed_output,
    ),
    Family(
        "distilbert",
        ("DistilBertModel",),
        attentions="transformer.layer.*.attention",
        stack="transformer",
        token_types=None,
        computed_positions=interleaved_sinusoids,
        names=AttentionNames(query="q_lin", key="k_lin", value="v_lin", heads="n_heads"),
        output=Projection("out_lin"),
    ),
    Family(
        "mpnet",
        ("MPNetModel",),
        attentions="encoder.layer.*.attention.attn",
        token_types=None,
        position_offset=after_padding_row,
        names=AttentionNames("q", "k", "v"),
        output=Projection("o"),
        relative_bias=bias_by_distance,
        methods_left_out=("compute_position_bias",),
    ),
)
