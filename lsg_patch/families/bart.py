"""Encoder-decoders of BART's shape: LSG in the encoder, full attention in the decoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lsg_patch.families.base import AttentionNames, Family, Projection, continued, no_offset


def own_offset(positions: nn.Module) -> int:
    """BART's table knows by how much its positions are shifted."""
    return int(positions.offset)  # type: ignore[arg-type]


def sinusoids(rows: Tensor, offset: int, length: int, config: Any) -> Tensor:
    """Sinusoids of ``length`` positions, all sines before all cosines, after ``rows`` (n, width)."""
    width = rows.shape[1]
    position = torch.arange(length, dtype=torch.float64)
    angle = position[:, None] / 10000 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    # rounded to float32, as those that a model is made with
    return continued(rows, torch.cat([angle.sin(), angle.cos()[:, : width // 2]], dim=1).float())


BART = Family(
    "bart",
    ("BartModel",),
    attentions="encoder.layers.*.self_attn",
    stack="encoder",
    embeddings="encoder",
    global_path=(),
    words="embed_tokens",
    positions="embed_positions",
    token_types=None,
    position_offset=own_offset,
    config_counts_offset=False,
    position_buffers=(),
    names=AttentionNames("q_proj", "k_proj", "v_proj", "num_heads", "dropout"),
    output=Projection("out_proj"),
    decoder="decoder",
    decoder_positions="decoder.embed_positions",
)
# mBART-50 and BARThez are mBART models; their inputs begin with a language or a word
MBART = replace(BART, name="mbart", base_classes=("MBartModel",), begins_with_cls=False)
PEGASUS = replace(
    MBART,
    name="pegasus",
    base_classes=("PegasusModel",),
    position_offset=no_offset,
    computed_positions=sinusoids,
)

FAMILIES = (BART, MBART, PEGASUS)
