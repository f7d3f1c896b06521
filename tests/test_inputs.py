"""What can be given to a patched model: each works as it does unpatched, or is a clear error."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import lsg_patch
from tests.models import FAMILIES, VOCABULARY, ids_like, right_padded, run, takes, tiny_model

SETTINGS: dict[str, Any] = {"block_size": 8, "sparse_block_size": 8, "max_position_embeddings": 100}
families = pytest.mark.parametrize("family", FAMILIES)


def patched_model(family: str = "bert", **settings: Any) -> Any:
    return lsg_patch.patch_model(tiny_model(family), **{**SETTINGS, **settings})


@families
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 99, 100])
def test_every_length_gives_its_own_length(family: str, length: int) -> None:
    model, mask = patched_model(family), right_padded(length, max(1, length - 3))
    with torch.no_grad():
        output = model(
            input_ids=ids_like(mask, family), attention_mask=mask, output_hidden_states=True
        )
    assert output.last_hidden_state.shape == (2, length, 32)
    assert {x.shape for x in output.hidden_states} == {output.last_hidden_state.shape}
    assert len(output.hidden_states) == 3
    assert all(torch.isfinite(x).all() for x in output.hidden_states)
    # some norm the last one, and give the others as they are
    plain = tiny_model(family)(ids_like(right_padded(3), family), output_hidden_states=True)
    if torch.equal(plain.hidden_states[-1], plain.last_hidden_state):
        assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


@families
def test_results_do_not_depend_on_padding_nor_on_other_rows(family: str) -> None:
    model = patched_model(family, sparsity_type="bos_pooling")
    text = ids_like(right_padded(61), family)
    alone = run(model, text, None)["last_hidden_state"]
    mask = right_padded(100, 61)
    ids = ids_like(mask, family, seed=9)
    ids[1, :61] = text[0]
    together = run(model, ids, mask)["last_hidden_state"]
    torch.testing.assert_close(together[1:, :61], alone, rtol=0, atol=1e-5)


def test_empty_batch() -> None:
    output = run(patched_model(), torch.zeros(0, 20, dtype=torch.long), torch.ones(0, 20))
    assert output["last_hidden_state"].shape == (0, 20, 32)


@pytest.mark.parametrize("mask", [None, torch.ones(2, 0)], ids=["no mask", "mask"])
def test_no_tokens(mask: torch.Tensor | None) -> None:
    with pytest.raises(ValueError, match="its length is 0"):
        run(patched_model(), torch.zeros(2, 0, dtype=torch.long), mask)


def test_more_tokens_than_positions() -> None:
    with pytest.raises(
        ValueError, match=r"101 tokens, the patched model 100 positions: .*larger max_position"
    ):
        run(patched_model(), ids_like(right_padded(101), "bert"), None)


def test_given_positions_stand_for_any_length() -> None:
    model, mask = patched_model(), right_padded(150)
    ids, positions = ids_like(mask, "bert"), torch.arange(150)[None]
    given = {"token_type_ids": torch.zeros_like(ids)}  # 4.x has no more of them than positions
    long = run(model, ids, None, position_ids=positions % 100, **given)["last_hidden_state"]
    assert long.shape == (1, 150, 32)
    with pytest.raises(IndexError):  # no position is made up
        run(model, ids, None, position_ids=positions, **given)


@pytest.mark.parametrize(("length", "rows"), [(16, 2 + 15), (17, 2 + 17), (40, 2 + 40)])
def test_hooks_inside_the_stack_see_its_rows(length: int, rows: int) -> None:
    """Two global tokens, the first of which replaces the first token in short inputs."""
    model, seen = patched_model(num_global_tokens=2), []
    layer = model.encoder.layer[0].attention.self.query
    layer.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    model.register_forward_hook(lambda module, args, output: seen.append(tuple(output[0].shape)))
    run(model, ids_like(right_padded(length), "bert"), None)
    assert seen == [(1, rows, 32), (1, length, 32)]


@pytest.mark.parametrize("bad", [VOCABULARY, -1])
def test_ids_out_of_range_fail_as_they_do_unpatched(bad: int) -> None:
    with pytest.raises(IndexError):
        run(patched_model(), torch.full((1, 40), bad), None)


@families
@pytest.mark.parametrize("num_global_tokens", [0, 1])
@pytest.mark.parametrize("length", [10, 50])
def test_a_row_of_padding_alone_is_finite(family: str, num_global_tokens: int, length: int) -> None:
    model = patched_model(family, num_global_tokens=num_global_tokens)
    mask = right_padded(length, 7)
    ids = ids_like(mask, family)
    expected = run(model, ids, mask)["last_hidden_state"][1]
    both = torch.stack([torch.zeros_like(mask[0]), mask[1]])
    output = run(model, ids, both)["last_hidden_state"]
    assert torch.isfinite(output).all()
    torch.testing.assert_close(output[1, :7], expected[:7], rtol=0, atol=1e-5)
    none = run(model, ids, torch.zeros_like(mask))["last_hidden_state"]
    assert torch.isfinite(none).all()


@pytest.mark.parametrize(
    "shape", [(2, 40, 40), (2, 1, 1, 40), (2, 1, 40, 40), (2, 39), (3, 40), (40,)]
)
def test_masks_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"attention_mask must be \(B, T\) = \(2, 40\)"):
        run(patched_model(), ids_like(right_padded(40, 40), "bert"), torch.ones(shape))


@families
@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32, torch.uint8])
def test_masks_of_every_type(family: str, dtype: torch.dtype) -> None:
    model, mask = patched_model(family), right_padded(50, 20)
    ids = ids_like(mask, family)
    expected = run(model, ids, mask)["last_hidden_state"]
    assert torch.equal(run(model, ids, mask.to(dtype))["last_hidden_state"], expected)


@families
def test_a_mask_of_ones_is_no_mask(family: str) -> None:
    model, mask = patched_model(family), right_padded(50)
    ids = ids_like(mask, family)
    with_mask, without = run(model, ids, mask), run(model, ids, None)
    torch.testing.assert_close(with_mask, without, rtol=0, atol=1e-6)


@families
def test_embeddings_in_place_of_ids_and_given_positions(family: str) -> None:
    model, mask = patched_model(family), right_padded(50, 33)
    ids = ids_like(mask, family)
    table = getattr(model.embeddings, "position_embeddings", None)
    known = lsg_patch.families.FAMILIES[family]
    offset = 0 if table is None or known.rotary else known.position_offset(table)
    positions = (torch.arange(50) + offset).expand(2, -1)
    given = {"position_ids": positions} if takes(model, "position_ids") else {}
    with torch.no_grad():
        words = model.get_input_embeddings()(ids)
        expected = model(input_ids=ids, attention_mask=mask, **given).last_hidden_state
        actual = model(attention_mask=mask, inputs_embeds=words, **given).last_hidden_state
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
        if given:
            flipped = {"position_ids": positions.flip(1)}
            reversed_ = model(input_ids=ids, attention_mask=mask, **flipped).last_hidden_state
            assert ((reversed_ - expected).abs().max() > 1e-2) == _reads_positions(family)


def _reads_positions(family: str) -> bool:
    """Whether the unpatched model does anything with positions (ESM that is rotary: from 5.6 on)."""
    model, ids = tiny_model(family), ids_like(right_padded(20), family)
    positions = torch.arange(2, 22)[None]
    counted = run(model, ids, None, position_ids=positions)["last_hidden_state"]
    reversed_ = run(model, ids, None, position_ids=positions.flip(1))["last_hidden_state"]
    return not torch.equal(counted, reversed_)


def test_arguments_by_position_and_by_name() -> None:
    model, mask = patched_model(), right_padded(50, 20)
    ids = ids_like(mask, "bert")
    types = (torch.arange(50) > 30).long().expand(2, -1)
    with torch.no_grad():
        by_name = model(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state
        by_position = model(ids, mask, types).last_hidden_state
        as_tuple = model(ids, mask, types, return_dict=False, output_hidden_states=True)
    assert torch.equal(by_name, by_position) and torch.equal(as_tuple[0], by_name)
    assert [x.shape[1] for x in as_tuple[2]] == [50, 50, 50]
    assert torch.equal(as_tuple[2][-1], by_name)


@families
def test_attentions_are_none_with_a_warning(family: str) -> None:
    model = patched_model(family)
    with pytest.warns(UserWarning, match="computes no .* attention maps"), torch.no_grad():
        output = model(ids_like(right_padded(50), family), output_attentions=True)
    assert output.attentions == (None, None)
    # once: Python shows a warning of one place once, unless told otherwise
    with warnings.catch_warnings(record=True) as shown, torch.no_grad():
        warnings.simplefilter("default")
        for _ in range(3):
            model(ids_like(right_padded(50), family), output_attentions=True)
    assert len([w for w in shown if "attention maps" in str(w.message)]) == 1


def test_without_adaptive_padding_a_length_must_fit() -> None:
    model, adaptive = patched_model(adaptive=False), patched_model()
    for length in (7, 16, 40):
        ids = ids_like(right_padded(length), "bert")
        assert torch.equal(
            run(model, ids, None)["last_hidden_state"],
            run(adaptive, ids, None)["last_hidden_state"],
        )
    with pytest.raises(ValueError, match="41 tokens are no multiple of block_size=8"):
        run(model, ids_like(right_padded(41), "bert"), None)


def test_the_callers_tensors_are_not_written_to() -> None:
    model, mask = patched_model(), torch.tensor([[0, 0, 1] + [1] * 47, [1] * 30 + [0] * 20])
    ids = ids_like(mask, "bert")
    for kind in (torch.long, torch.float32):
        given_ids, given_mask = ids.clone(), mask.to(kind)
        run(model, given_ids, given_mask)
        assert torch.equal(given_ids, ids) and torch.equal(given_mask, mask.to(kind))


def test_mask_first_token_hides_the_first_real_token_of_each_row() -> None:
    """As a key: only its own output, which the global token's replaces, could change."""
    model = patched_model()
    mask = torch.tensor([[0] * 6 + [1] * 44, [1] * 50])
    ids = ids_like(mask, "bert", begin_with_cls=False)
    other = ids.clone()
    other[0, 6], other[1, 0] = 7, 8
    assert torch.equal(
        run(model, other, mask)["last_hidden_state"], run(model, ids, mask)["last_hidden_state"]
    )
    seen = patched_model(mask_first_token=False)
    difference = (
        run(seen, other, mask)["last_hidden_state"] - run(seen, ids, mask)["last_hidden_state"]
    )
    assert (difference[0, 7:9].abs().max() > 1e-3) and (difference[1, 1:3].abs().max() > 1e-3)
