"""Settings of the first token and of the global tokens, with every head."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lsg_patch
from tests import seq2seq
from tests.models import FAMILIES, ids_like, model_classes, right_padded, run, tiny_model

HEADS = [(family, cls) for family in FAMILIES for cls in model_classes(family)]
heads = pytest.mark.parametrize(("family", "cls"), HEADS, ids=[cls.__name__ for _, cls in HEADS])
SETTINGS: dict[str, Any] = {"block_size": 8, "sparse_block_size": 8, "max_position_embeddings": 64}
MASK = right_padded(40, 29)  # long: more than two blocks, and what the unpatched model reads too


def outputs(family: str, cls: type[Any], **settings: Any) -> dict[str, torch.Tensor]:
    model = tiny_model(family, cls)
    with lsg_patch.patched(model, **SETTINGS, **settings):
        found = run(model, ids_like(MASK, family), MASK)
    assert all(torch.isfinite(x).all() for x in found.values())
    return found


def differ(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    assert some.keys() == others.keys()
    return any((some[name] - others[name]).abs().max() > 1e-4 for name in some)


@heads
def test_pooling_gives_the_first_row_to_the_global_token(family: str, cls: type[Any]) -> None:
    pooled = outputs(family, cls, mask_first_token=False)
    own = outputs(family, cls, mask_first_token=False, pool_with_global=False)
    summary = getattr(tiny_model(family, cls), "sequence_summary", None)
    reads_last = getattr(summary, "summary_type", "first") == "last"  # RoFormer's multiple choice
    assert differ(pooled, own) != reads_last
    if "last_hidden_state" in own:
        torch.testing.assert_close(
            pooled["last_hidden_state"][:, 1:], own["last_hidden_state"][:, 1:], rtol=0, atol=1e-6
        )


@heads
def test_the_first_token_is_seen_unless_masked(family: str, cls: type[Any]) -> None:
    masked, seen = (outputs(family, cls, mask_first_token=hidden) for hidden in (True, False))
    assert differ(masked, seen)


@heads
def test_512_global_tokens_give_outputs_of_the_same_shapes(family: str, cls: type[Any]) -> None:
    expected = run(tiny_model(family, cls), ids_like(MASK, family), MASK)
    many = outputs(family, cls, num_global_tokens=512)
    assert {name: x.shape for name, x in many.items()} == {
        name: x.shape for name, x in expected.items()
    }
    assert differ(many, outputs(family, cls))


@pytest.mark.parametrize("family", [*FAMILIES, *seq2seq.FAMILIES])
def test_every_one_of_512_global_tokens_is_trained(family: str) -> None:
    is_pair = family in seq2seq.FAMILIES
    model = seq2seq.tiny_model(family) if is_pair else tiny_model(family)
    ids = seq2seq.ids_like(MASK) if is_pair else ids_like(MASK, family)
    lsg_patch.patch_model(model, num_global_tokens=512, **SETTINGS)
    encoder = model.get_encoder() if is_pair else model
    encoder(input_ids=ids, attention_mask=MASK).last_hidden_state.square().sum().backward()
    gradient = lsg_patch.global_embeddings(model).grad
    assert gradient is not None and (gradient.abs().sum(1) > 0).all()
