"""MPNet: scores have a bias by the distance of two tokens, of one table for all layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lsg_patch.families.base import AttentionNames, Family, after_padding_row
from lsg_patch.offloading import device_of

# tokens farther away than this share one bucket of the table
LARGEST_DISTANCE = 128


def bias_by_distance(stack: Any) -> Tensor:
    """MPNet's own buckets of all distances, looked up in its table."""
    table = stack.relative_attention_bias
    distance = torch.arange(-LARGEST_DISTANCE, LARGEST_DISTANCE + 1, device=device_of(table))
    bias: Tensor = table(stack.relative_position_bucket(distance)).T
    return bias


def projected(module: Any, hidden: Tensor, context: Tensor) -> Tensor:
    """The output projection, which MPNet's attention module holds."""
    return module.o(context)  # type: ignore[no-any-return]


MPNET = Family(
    "mpnet",
    ("MPNetModel",),
    attentions="encoder.layer.*.attention.attn",
    token_types=None,
    position_offset=after_padding_row,
    names=AttentionNames("q", "k", "v"),
    output=projected,
    relative_bias=bias_by_distance,
    methods_left_out=("compute_position_bias",),
)

FAMILIES = (MPNET,)
