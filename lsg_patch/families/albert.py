"""ALBERT: layers that share their weights, embeddings narrower than the stack."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lsg_patch.families.base import AttentionNames, Family


def to_normed_output(module: Any, hidden: Tensor, context: Tensor) -> Tensor:
    """Output projection, dropout, residual and norm, which ALBERT's attention module holds."""
    normed: Tensor = module.LayerNorm(hidden + module.output_dropout(module.dense(context)))
    return normed


# a group's layer runs several times and is swapped once; the stack itself widens the embeddings
ALBERT = Family(
    "albert",
    ("AlbertModel",),
    attentions="encoder.albert_layer_groups.*.albert_layers.*.attention",
    names=AttentionNames(dropout="attention_dropout"),
    output=to_normed_output,
)

FAMILIES = (ALBERT,)
