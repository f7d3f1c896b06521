"""Families that read documents with a layout: each token has a place besides its position.

Where an input does not tell it, and for the token that an input begins with, it is an empty one; a
global token replaces that token, so it has the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lsg_patch.families.base import Family, after_padding_row
from lsg_patch.offloading import value_of


def empty_box(embeddings: Any, config: Any) -> Tensor:
    """LayoutLM's embedding of the box 0, 0, 0, 0: two corners, a height and a width."""
    x, y, height, width = (
        value_of(getattr(embeddings, f"{name}_position_embeddings"))[0] for name in "xyhw"
    )
    box: Tensor = 2 * x + 2 * y + height + width
    return box


def empty_path(embeddings: Any, config: Any) -> Tensor:
    """MarkupLM's embedding of a place outside of all tags; without dropout."""
    paths = embeddings.xpath_embeddings
    tags = [value_of(table)[config.tag_pad_id] for table in paths.xpath_tag_sub_embeddings]
    indices = [value_of(table)[config.subs_pad_id] for table in paths.xpath_subs_sub_embeddings]
    place = torch.cat(tags) + torch.cat(indices)
    unit = paths.xpath_unitseq2_inner(place[None, None])  # a batch, as hooks know it
    path: Tensor = paths.inner2emb(paths.activation(unit))[0, 0]
    return path


FAMILIES = (
    Family("layoutlm", ("LayoutLMModel",), first_token_extra=empty_box),
    Family(
        "markuplm",
        ("MarkupLMModel",),
        first_token_extra=empty_path,
        position_offset=after_padding_row,
    ),
)
