"""What reaches a token, exactly, through the gradient of one layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lsg_patch
from tests import models, seq2seq
from tests.models import POSITIONS

BLOCK, SPARSE, FACTOR = 8, 8, 2
SETTINGS: dict[str, Any] = {
    "block_size": BLOCK,
    "sparse_block_size": SPARSE,
    "sparsity_factor": FACTOR,
    "sparsity_type": "pooling",  # every token in reach counts
}


def one_layer(family: str) -> Any:
    if family in seq2seq.FAMILIES:
        return seq2seq.tiny_model(family, encoder_layers=1)
    return models.tiny_model(family, num_hidden_layers=1)


@pytest.mark.parametrize("family", [*models.FAMILIES, *seq2seq.FAMILIES])
@pytest.mark.parametrize("times", [2, 8])
def test_a_token_is_reached_from_its_windows_and_from_global_tokens_alone(
    family: str, times: int
) -> None:
    length = times * POSITIONS
    model = one_layer(family)
    words = model.get_input_embeddings().weight.detach()
    ids = torch.randint(len(words), (1, length), generator=torch.Generator().manual_seed(0))
    with lsg_patch.patched(
        model,
        **SETTINGS,
        max_position_embeddings=length,
        num_global_tokens=3,
        mask_first_token=False,
    ):
        embeds = words[ids].requires_grad_(True)
        stack = model.get_encoder() if family in seq2seq.FAMILIES else model
        hidden = stack(inputs_embeds=embeds).last_hidden_state
        assert torch.isfinite(hidden).all()
        token = length // 2 + 3
        probe = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(1))
        of_words, of_globals = torch.autograd.grad(
            hidden[0, token] @ probe, [embeds, lsg_patch.global_embeddings(model)]
        )
    reached = of_words[0].abs().sum(-1) > 0
    block = token // BLOCK
    first = (block - 1) * BLOCK - SPARSE * FACTOR
    last = (block + 2) * BLOCK + SPARSE * FACTOR
    position = torch.arange(length)
    assert torch.equal(reached, (position >= first) & (position < last))
    assert (of_globals.abs().sum(-1) > 0).all()
