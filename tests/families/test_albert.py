"""ALBERT: shared layers, groups of them, and embeddings narrower than the stack."""

from __future__ import annotations

import pytest
import torch

import lsg_patch
from lsg_patch.modules.self_attention import LSGSelfAttention
from tests.models import assert_same, attentions, ids_like, right_padded, run, tiny_model


def test_a_shared_layer_is_swapped_once_and_runs_for_every_layer() -> None:
    model = tiny_model("albert", num_hidden_layers=3)
    lsg_patch.patch_model(model, num_global_tokens=2)
    (attention,) = attentions(model, "albert")
    assert isinstance(attention, LSGSelfAttention)
    assert lsg_patch.global_embeddings(model).shape == (2, 16)
    runs: list[int] = []
    attention.register_forward_hook(lambda *_: runs.append(1))
    mask = right_padded(70, 40)
    output = run(model, ids_like(mask, "albert"), mask)
    assert len(runs) == 3 and output["last_hidden_state"].shape == (2, 70, 32)
    with pytest.warns(UserWarning, match="attention maps"):
        output = model(ids_like(mask, "albert"), mask, output_attentions=True)
    assert output.attentions == (None, None, None)


def test_groups_of_layers() -> None:
    model = tiny_model("albert", num_hidden_layers=4, num_hidden_groups=2, inner_group_num=2)
    mask = right_padded(30, 14)
    ids = ids_like(mask, "albert")
    expected = run(model, ids, mask)
    with torch.no_grad():
        before = model(ids, mask, output_hidden_states=True).hidden_states
        with lsg_patch.patched(model, block_size=16):
            after = model(ids, mask, output_hidden_states=True).hidden_states
            assert len(attentions(model, "albert")) == 4
            assert_same(run(model, ids, mask), expected, mask, 1e-5)
    assert len(after) == len(before)
    for got, want in zip(after, before, strict=True):
        torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=0, atol=1e-5)
