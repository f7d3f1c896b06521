"""RoFormer: positions turn queries, keys and, by an option, values; its table holds their sines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import lsg_patch
from tests.models import (
    POSITIONS,
    assert_same,
    attentions,
    ids_like,
    model_classes,
    modeling_module,
    right_padded,
    run,
    tiny_model,
)
from tests.rotary import LEFT, check_left_padding, check_turned_attention

SETTINGS: dict[str, Any] = {
    "block_size": 16,
    "sparse_block_size": 16,
    "max_position_embeddings": 8 * POSITIONS,
}


@pytest.mark.parametrize("rotary_value", [False, True])
@pytest.mark.parametrize("num_global_tokens", [1, 5])
@pytest.mark.parametrize("mask", [None, right_padded(30, 13), LEFT], ids=["all", "right", "left"])
def test_global_tokens_do_not_shift_the_others(
    mask: Any, num_global_tokens: int, rotary_value: bool
) -> None:
    model = tiny_model("roformer", rotary_value=rotary_value, num_hidden_layers=1)
    settings = {**SETTINGS, "num_global_tokens": num_global_tokens, "mask_first_token": False}
    lsg_patch.patch_model(model, **settings)
    check_turned_attention(model, "roformer", mask, num_global_tokens, turns_values=rotary_value)


@pytest.mark.parametrize("rotary_value", [False, True])
@pytest.mark.parametrize("mask", [right_padded(32, 9), LEFT], ids=["right", "left"])
@pytest.mark.parametrize("num_global_tokens", [0, 1])
def test_short_inputs_give_the_original(
    mask: torch.Tensor, num_global_tokens: int, rotary_value: bool
) -> None:
    """Also where padding stands before the text: the first global token stands where cls does."""
    model, ids = tiny_model("roformer", rotary_value=rotary_value), ids_like(mask, "roformer")
    expected = run(model, ids, mask)
    with lsg_patch.patched(model, num_global_tokens=num_global_tokens, **SETTINGS):
        assert_same(run(model, ids, mask), expected, mask, 1e-5)


@pytest.mark.parametrize("cls", model_classes("roformer"), ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("embedding_size", [32, 24])
def test_embeddings_as_wide_as_the_stack_and_others(cls: type[Any], embedding_size: int) -> None:
    model = tiny_model("roformer", cls, embedding_size=embedding_size)
    mask = right_padded(32, 17)
    ids = ids_like(mask, "roformer")
    expected = run(model, ids, mask)
    with lsg_patch.patched(model, **SETTINGS):
        assert lsg_patch.global_embeddings(model).shape == (1, embedding_size)
        assert_same(run(model, ids, mask), expected, mask, 1e-5)


@pytest.mark.parametrize("times", [4, 8])
def test_long_inputs_are_turned_as_far_as_a_long_model_turns_them(times: int) -> None:
    """A block that holds all of it: the same as a model made for the length."""
    length = times * POSITIONS
    model, mask = tiny_model("roformer"), right_padded(length, length - 100)
    long_model = tiny_model("roformer", max_position_embeddings=length)
    long_model.load_state_dict(
        {**model.state_dict(), **_table(long_model)}  # of its own length
    )
    ids = ids_like(mask, "roformer")
    expected = run(long_model, ids, mask)
    settings = {**SETTINGS, "block_size": length // 2}
    with lsg_patch.patched(model, **settings):
        assert_same(run(model, ids, mask), expected, mask, 1e-5)
    with lsg_patch.patched(model, **SETTINGS):
        output = run(model, ids, mask)["last_hidden_state"]
    assert torch.isfinite(output).all()
    assert (output - expected["last_hidden_state"])[mask.bool()].abs().max() > 1e-2


def _table(model: Any) -> dict[str, torch.Tensor]:
    return {k: v for k, v in model.state_dict().items() if "embed_positions" in k}


def test_the_table_of_sines_is_that_of_a_model_of_the_new_length() -> None:
    model, longer = tiny_model("roformer"), tiny_model("roformer", max_position_embeddings=300)
    table = model.encoder.embed_positions
    old, stored = table.weight, table.weight.detach().clone()
    lsg_patch.patch_model(model, max_position_embeddings=300)
    torch.testing.assert_close(
        table.weight.data, longer.encoder.embed_positions.weight.data, rtol=0, atol=1e-6
    )
    assert torch.equal(table.weight[:POSITIONS], stored)
    lsg_patch.unpatch_model(model)
    assert table.weight is old and torch.equal(old, stored)


def test_a_saved_patched_model_is_patched_again(tmp_path: Any) -> None:
    """Global tokens have the same positions then, though the model is a longer one now."""
    model, mask = tiny_model("roformer"), right_padded(200, 150)
    settings = {**SETTINGS, "num_global_tokens": 5}
    ids = ids_like(mask, "roformer")
    lsg_patch.patch_model(model, **settings)
    expected = run(model, ids, mask)["last_hidden_state"]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    loaded = transformers.RoFormerModel.from_pretrained(tmp_path).eval()
    assert loaded.encoder.embed_positions.weight.shape == (8 * POSITIONS, 8)
    lsg_patch.patch_model(loaded, **settings)
    loaded.load_state_dict(state)
    assert torch.equal(run(loaded, ids, mask)["last_hidden_state"], expected)


@pytest.mark.parametrize("sparsity_type", ["norm", "lsh"])
@pytest.mark.parametrize("unpad", [False, True])
def test_padding_on_the_left_chooses_no_other_tokens(sparsity_type: str, unpad: bool) -> None:
    check_left_padding(tiny_model("roformer"), "roformer", sparsity_type, unpad)


def test_the_layers_turn_by_the_models_own_rule() -> None:
    """The oracle above turns by complex numbers; here the model's own function is the witness."""
    from lsg_patch.attention.rotary import rotate

    attention = attentions(tiny_model("roformer"), "roformer")[0]
    own: Any = modeling_module("roformer").RoFormerSelfAttention
    query, key = torch.randn(2, 2, 4, 10, 8).unbind()
    angle = torch.randn(10, 4)
    sines = torch.cat([angle.sin(), angle.cos()], -1)[None, None]
    expected, _ = own.apply_rotary_position_embeddings(sines, query, key)
    actual = rotate(query, (angle.cos()[None], angle.sin()[None]), interleaved=True)
    assert isinstance(attention, own)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_global_tokens_do_not_stand_beyond_the_last_position() -> None:
    """Counted from where the text begins they would, behind much padding."""
    model = tiny_model("roformer")
    lsg_patch.patch_model(model, **{**SETTINGS, "num_global_tokens": 40})
    mask = right_padded(500, 150).flip(1)
    output = run(model, ids_like(mask, "roformer"), mask)["last_hidden_state"]
    assert torch.isfinite(output).all()


def test_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    model = tiny_model("roformer", rotary_value=True)
    lsg_patch.patch_model(model, **{**SETTINGS, "num_global_tokens": 3})
    mask = right_padded(150, 90)
    ids = ids_like(mask, "roformer")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_same(run(compiled, ids, mask), run(model, ids, mask), mask, 1e-5)


@pytest.mark.parametrize("unpad", [False, None])
def test_padding_pushes_no_global_token_out_of_the_table(unpad: bool | None) -> None:
    model = tiny_model("roformer", max_position_embeddings=512)
    settings = {"block_size": 32, "sparse_block_size": 32, "max_position_embeddings": 512}
    lsg_patch.patch_model(model, num_global_tokens=8, unpad=unpad, **settings)
    text, outputs = ids_like(torch.ones(1, 200, dtype=torch.long), "roformer"), []
    for left in (0, 100, 312):
        padding = torch.zeros(1, left, dtype=torch.long)
        ids, mask = (torch.cat([padding, x], dim=1) for x in (text, torch.ones_like(text)))
        outputs.append(run(model, ids, mask)["last_hidden_state"][:, left:])
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=0, atol=1e-5)
