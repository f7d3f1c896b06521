"""DistilBERT: positions of sinusoids are computed for the new length."""

from __future__ import annotations

import pytest
import torch

import lsg_patch
from tests.models import CLS, POSITIONS, ids_like, modeling_module, right_padded, tiny_model


@pytest.mark.parametrize("length", [200, 20])
def test_sinusoids_are_those_that_a_model_of_the_new_length_has(length: int) -> None:
    model = tiny_model("distilbert", sinusoidal_pos_embds=True)
    table = model.embeddings.position_embeddings
    sinusoids = torch.zeros(max(length, POSITIONS), 32)
    modeling_module("distilbert").create_sinusoidal_embeddings(len(sinusoids), 32, out=sinusoids)
    table.weight.data.copy_(sinusoids[:POSITIONS])  # fresh models of old versions lack them
    old, stored = table.weight, table.weight.detach().clone()
    lsg_patch.patch_model(model, max_position_embeddings=length)
    assert table.weight.shape == (length, 32)
    assert table.weight.requires_grad is old.requires_grad  # fixed before 5.0
    torch.testing.assert_close(table.weight.data, sinusoids[:length], rtol=0, atol=1e-6)
    kept = min(length, POSITIONS)
    assert torch.equal(table.weight[:kept], stored[:kept])
    lsg_patch.unpatch_model(model)
    assert table.weight is old and torch.equal(old, stored)


def test_learned_positions_are_repeated() -> None:
    model = tiny_model("distilbert")
    stored = model.embeddings.position_embeddings.weight.detach().clone()
    lsg_patch.patch_model(model, max_position_embeddings=2 * POSITIONS)
    assert torch.equal(model.embeddings.position_embeddings.weight, torch.cat([stored, stored]))
    first = model.embeddings.word_embeddings.weight[CLS] + stored[0]
    assert torch.equal(lsg_patch.global_embeddings(model)[0], first)


def test_outputs_as_a_tuple() -> None:
    model, mask = lsg_patch.patch_model(tiny_model("distilbert")), right_padded(300, 120)
    ids = ids_like(mask, "distilbert")
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        last, hidden = model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, return_dict=False
        )
    assert torch.equal(last, output.last_hidden_state)
    assert [x.shape for x in hidden] == [(2, 300, 32)] * 3
