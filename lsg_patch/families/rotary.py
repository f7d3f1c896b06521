"""Families with rotary positions: ESM, which reads proteins, and RoFormer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lsg_patch.families.bart import sinusoids
from lsg_patch.families.base import Family, Rotary, after_padding_row
from lsg_patch.offloading import value_of

# the share of masked tokens that every ESM model was trained with
MASKED_IN_TRAINING = 0.15 * 0.8


def by_frequencies(stack: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
    """ESM's: each layer has the frequencies, the same ones. In float32, whatever the model is in."""
    frequencies = stack.layer[0].attention.self.rotary_embeddings.inv_freq
    angles = positions[..., None].to(torch.float32) * frequencies.to(torch.float32)
    return angles.cos(), angles.sin()


def by_table(stack: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
    """RoFormer's: a table of sines, and of cosines after them. None is beyond its last row."""
    table = value_of(stack.embed_positions)
    sin, cos = table[positions.clamp(max=len(table) - 1)].chunk(2, dim=-1)
    return cos, sin


def is_rotary(config: Any) -> bool:
    """ESM-2 and later; the positions of ESM-1b are a table."""
    return bool(config.position_embedding_type == "rotary")


def turns_values(attention: Any) -> bool:
    """RoFormer's option ``rotary_value``."""
    return bool(attention.rotary_value)


def token_dropout(embeddings: Any, ids: Tensor | None, mask: Tensor | None) -> Tensor | float:
    """ESM's factor of words: it makes up for masked tokens, which are set to zero.

    Source: its embeddings; Rives et al., doi 10.1073/pnas.2016239118.
    """
    if not embeddings.token_dropout:
        return 1.0
    if ids is None:
        return 1 - MASKED_IN_TRAINING
    length = ids.shape[1] if mask is None else mask.sum(-1)
    masked = (ids == embeddings.mask_token_id).sum(-1) / length
    scale: Tensor = (1 - MASKED_IN_TRAINING) / (1 - masked)
    return scale[:, None, None]


FAMILIES = (
    Family(
        "esm",
        ("EsmModel",),
        global_path=("layer_norm",),
        token_types=None,
        position_offset=after_padding_row,
        rotary=Rotary(by_frequencies, is_used=is_rotary),
        word_scale=token_dropout,
    ),
    Family(
        "roformer",
        ("RoFormerModel",),
        projection="embeddings_project",
        positions=None,
        computed_positions=sinusoids,
        rotary=Rotary(
            by_table, interleaved=True, turns_values=turns_values, table="encoder.embed_positions"
        ),
    ),
)
