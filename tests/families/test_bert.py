"""What a global token of ERNIE has besides a word; a stack that is written for decoding too."""

from __future__ import annotations

import pytest
import torch
import transformers

import lsg_patch
from tests.models import CLS, assert_same, ids_like, right_padded, run, tiny_model


@pytest.mark.parametrize("use_task_id", [True, False])
def test_a_global_token_of_ernie_has_the_first_task(use_task_id: bool) -> None:
    model = tiny_model("ernie", use_task_id=use_task_id)
    tables = model.embeddings
    first = tables.word_embeddings.weight[CLS] + tables.position_embeddings.weight[0]
    first = first + tables.token_type_embeddings.weight[0]
    if use_task_id:
        first = first + tables.task_type_embeddings.weight[0]
    lsg_patch.patch_model(model)
    torch.testing.assert_close(lsg_patch.global_embeddings(model)[0], first, rtol=0, atol=1e-6)


def test_bert_generation_is_an_encoder_unless_its_config_says_decoder() -> None:
    ids = ids_like(right_padded(50), "bert-generation")
    other = ids.clone()
    other[0, -1] = 7
    for is_decoder in (False, True):
        cls = transformers.BertGenerationDecoder if is_decoder else None
        model = lsg_patch.patch_model(tiny_model("bert-generation", cls, is_decoder=is_decoder))
        # inputs do not begin with cls, so nothing replaces their first token
        assert lsg_patch.get_config(model).mask_first_token is False
        (first, second) = (next(iter(run(model, x, None).values())) for x in (ids, other))
        assert torch.equal(first[:, :-1], second[:, :-1]) is is_decoder


def test_languages_of_xmod_are_given_for_each_row() -> None:
    model, mask = tiny_model("xmod"), right_padded(30, 12)
    ids, languages = ids_like(mask, "xmod"), torch.tensor([1, 0])
    expected = run(model, ids, mask, lang_ids=languages)
    with lsg_patch.patched(model, block_size=16):
        assert_same(run(model, ids, mask, lang_ids=languages), expected, mask, 1e-5)
        other = run(model, ids, mask)["last_hidden_state"]
    assert (other[1, :12] - expected["last_hidden_state"][1, :12]).abs().max() > 1e-2
