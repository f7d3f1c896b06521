"""Up to two blocks everything is seen: a patched model gives the original's outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lsg_patch
from tests.models import (
    FAMILIES,
    assert_same,
    ids_like,
    model_classes,
    right_padded,
    run,
    stand_in,
    tiny_model,
)

HEADS = [(family, cls) for family in FAMILIES for cls in model_classes(family)]
IDS = [cls.__name__ for _, cls in HEADS]
BLOCK = 16
SETTINGS: dict[str, Any] = {
    "block_size": BLOCK,
    "sparse_block_size": BLOCK,
    "max_position_embeddings": 256,
}
LEFT = torch.tensor([[1] * 24, [0] * 7 + [1] * 17])
HOLES = torch.tensor([[1] * 24, [0, 1, 1, 0, 1, 0, 0] + [1] * 12 + [0, 1, 1, 0, 0]])


@pytest.mark.parametrize(("family", "cls"), HEADS, ids=IDS)
@pytest.mark.parametrize("lengths", [(2 * BLOCK, 2 * BLOCK), (25, 9), (1, 1)], ids=str)
def test_defaults_give_the_original_for_inputs_that_begin_with_cls(
    family: str, cls: type[Any], lengths: tuple[int, int]
) -> None:
    model, mask = tiny_model(family, cls), right_padded(*lengths)
    ids = ids_like(mask, family)
    expected = run(model, ids, mask)
    with lsg_patch.patched(model, **SETTINGS, **stand_in(family)):
        assert_same(run(model, ids, mask), expected, mask, 1e-5)


@pytest.mark.parametrize(("family", "cls"), HEADS, ids=IDS)
@pytest.mark.parametrize(
    "mask", [right_padded(32, 11), LEFT, HOLES, None], ids=["right", "left", "holes", "no mask"]
)
def test_without_global_tokens_any_input_gives_the_original(
    family: str, cls: type[Any], mask: torch.Tensor | None
) -> None:
    model = tiny_model(family, cls)
    ids = ids_like(torch.ones(2, 20) if mask is None else mask, family, begin_with_cls=False)
    expected = run(model, ids, mask)
    with lsg_patch.patched(model, num_global_tokens=0, **SETTINGS):
        assert_same(run(model, ids, mask), expected, mask, 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_the_original_ones(family: str) -> None:
    model, mask = tiny_model(family), right_padded(30, 12)
    ids = ids_like(mask, family)
    with torch.no_grad():
        given = {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True}
        expected = model(**given).hidden_states
        with lsg_patch.patched(model, **SETTINGS, **stand_in(family)):
            actual = model(**given).hidden_states
    assert len(actual) == len(expected) == 3
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=0, atol=1e-5)


def test_hidden_states_of_some_layers_have_the_length_of_the_input() -> None:
    """As `transformers` 5.23 gives them: None for a layer that was not asked for."""
    model, mask = tiny_model("bert"), right_padded(2 * BLOCK + 3)
    given = {"input_ids": ids_like(mask, "bert"), "attention_mask": mask}
    with torch.no_grad(), lsg_patch.patched(model, **SETTINGS):
        every = model(**given, output_hidden_states=True).hidden_states
        some = model(**given, output_hidden_states=[0, -1]).hidden_states
    if some[1] is not None:
        pytest.skip("this transformers takes no list of layers: it gives all")
    torch.testing.assert_close((some[0], some[2]), (every[0], every[2]))


def test_one_token_beyond_two_blocks_is_no_longer_the_original() -> None:
    """Otherwise the tests above would pass with full attention everywhere."""
    model, mask = tiny_model("bert"), right_padded(2 * BLOCK + 1)
    ids = ids_like(mask, "bert")
    expected = run(model, ids, mask)["last_hidden_state"]
    with lsg_patch.patched(model, **{**SETTINGS, "sparsity_type": "none"}):
        actual = run(model, ids, mask)["last_hidden_state"]
    assert (actual - expected).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "camembert", "mpnet"])
def test_left_padding_is_lossless_where_positions_count_from_the_text(family: str) -> None:
    model = tiny_model(family)
    ids = ids_like(LEFT, family)
    expected = run(model, ids, LEFT)["last_hidden_state"]
    with lsg_patch.patched(model, **SETTINGS):
        actual = run(model, ids, LEFT)["last_hidden_state"]
    torch.testing.assert_close(actual[LEFT.bool()], expected[LEFT.bool()], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "electra"])
def test_left_padding_of_bert_is_lossless_with_positions_that_count_from_the_text(
    family: str,
) -> None:
    """BERT counts positions from the padding: only then is the first real token at position 0,
    where the first global token, which replaces it, is.
    """
    model = tiny_model(family)
    ids = ids_like(LEFT, family)
    positions = (LEFT.cumsum(1) - 1).clamp(min=0)
    expected = run(model, ids, LEFT, position_ids=positions)["last_hidden_state"]
    counted = run(model, ids, LEFT)["last_hidden_state"]
    with lsg_patch.patched(model, **SETTINGS):
        actual = run(model, ids, LEFT, position_ids=positions)["last_hidden_state"]
        actual_counted = run(model, ids, LEFT)["last_hidden_state"]
    torch.testing.assert_close(actual[LEFT.bool()], expected[LEFT.bool()], rtol=0, atol=1e-5)
    assert torch.isfinite(actual_counted).all()
    assert (actual_counted[1, 7:] - counted[1, 7:]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["roberta", "mpnet"])
def test_left_padded_text_gives_what_right_padded_text_gives_at_any_length(family: str) -> None:
    """Blocks begin where the text begins, however much padding stands before it."""
    model, long = tiny_model(family), 100
    text = ids_like(torch.ones(1, long, dtype=torch.long), family)
    mask = torch.cat(
        [torch.zeros(1, 13, dtype=torch.long), torch.ones(1, long, dtype=torch.long)], 1
    )
    ids = torch.cat([torch.full((1, 13), 1), text], 1)
    with lsg_patch.patched(model, **SETTINGS):
        alone = run(model, text, None)["last_hidden_state"]
        padded = run(model, ids, mask)["last_hidden_state"]
    torch.testing.assert_close(padded[:, 13:], alone, rtol=0, atol=1e-5)
    # what heads read at row 0 is the token that the text begins with
    torch.testing.assert_close(padded[:, 0], alone[:, 0], rtol=0, atol=1e-5)
