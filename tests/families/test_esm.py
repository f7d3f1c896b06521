"""ESM: rotary positions (ESM-2) or a table (ESM-1b), words scaled for masked tokens."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import lsg_patch
from tests.models import (
    MASK,
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
from tests.test_patching import assert_bitwise, fingerprint, values

SETTINGS: dict[str, Any] = {
    "block_size": 16,
    "sparse_block_size": 16,
    "max_position_embeddings": 8 * POSITIONS,
}
# as facebook/esm1b_t33_650M_UR50S and facebook/esm2_t33_650M_UR50D have it
ESM_1B: dict[str, Any] = {
    "position_embedding_type": "absolute",
    "emb_layer_norm_before": True,
    "token_dropout": True,
    "max_position_embeddings": POSITIONS + 2,
}
ESM_2: dict[str, Any] = {"token_dropout": True, "emb_layer_norm_before": False}
KINDS = pytest.mark.parametrize("kind", [ESM_1B, ESM_2], ids=["ESM-1b", "ESM-2"])
MASKS = pytest.mark.parametrize(
    "mask", [right_padded(32, 9), LEFT, None], ids=["right", "left", ""]
)


def ids_of(mask: Tensor | None, masked: bool = True) -> Tensor:
    """Ids that begin with cls, in which some are masked: not as many in the second row."""
    shape = torch.ones(2, 25, dtype=torch.long) if mask is None else mask
    ids = ids_like(shape, "esm")
    if masked:
        ids[0, 3:12], ids[1, -13:-11] = MASK, MASK
        ids = ids.masked_fill(shape == 0, 1)
    return ids


@KINDS
@pytest.mark.parametrize("kind_of_hook", ["forward", "backward"])
def test_words_are_scaled_alike_where_a_hook_gives_another_tensor(
    kind: dict[str, Any], kind_of_hook: str
) -> None:
    """That the global tokens are noted on: their scale is kept, for an input of as many rows."""
    mask = right_padded(32, 9)
    ids = ids_of(mask)
    model = lsg_patch.patch_model(tiny_model("esm", **kind), **SETTINGS)
    expected = model(ids, attention_mask=mask).last_hidden_state
    embeddings = model.embeddings
    if kind_of_hook == "forward":
        embeddings.register_forward_hook(lambda _, args, output: output * 1)
    else:
        embeddings.register_full_backward_hook(lambda *_: None)
    found = model(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-6)


def test_words_of_another_batch_are_not_scaled_as_those_before() -> None:
    model = lsg_patch.patch_model(tiny_model("esm", **ESM_1B), **SETTINGS)
    given = torch.ones(3, 40, 32)
    with torch.no_grad():
        expected = model.encoder(given)[0]
        model.embeddings(ids_of(None))  # of two rows, and not gone on with
        assert torch.equal(model.encoder(given)[0], expected)


@pytest.mark.parametrize("num_global_tokens", [1, 5])
@MASKS
def test_global_tokens_do_not_shift_the_others(mask: Any, num_global_tokens: int) -> None:
    model = tiny_model("esm", num_hidden_layers=1)
    settings = {**SETTINGS, "num_global_tokens": num_global_tokens, "mask_first_token": False}
    lsg_patch.patch_model(model, **settings)
    check_turned_attention(model, "esm", mask, num_global_tokens)


# EsmForProteinFolding is none of them: it reads all hidden states of an ESM-2 inside it into a
# trunk that is cubic in the length, which a patch of the ESM-2 leaves as it is
@pytest.mark.parametrize("cls", model_classes("esm"), ids=lambda cls: cls.__name__)
@KINDS
@MASKS
@pytest.mark.parametrize("num_global_tokens", [0, 1])
def test_short_proteins_give_the_original(
    cls: type[Any], kind: dict[str, Any], mask: Tensor | None, num_global_tokens: int
) -> None:
    """With masked tokens, more of them in one row than in another, and padding on either side."""
    model, ids = tiny_model("esm", cls, **kind), ids_of(mask)
    expected = run(model, ids, mask)
    with lsg_patch.patched(model, num_global_tokens=num_global_tokens, **SETTINGS):
        actual = run(model, ids, mask)
    if mask is LEFT and num_global_tokens:
        # what is made of row 0 is made of the text's first token, no longer of padding
        (actual, expected) = (_of_tokens(x, mask) for x in (actual, expected))
    if expected:
        assert_same(actual, expected, mask, 1e-5)


def _of_tokens(outputs: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    return {name: x for name, x in outputs.items() if x.shape[:2] == mask.shape}


@KINDS
def test_masked_tokens_matter_for_the_words_of_their_row(kind: dict[str, Any]) -> None:
    """So that the test above can fail: global tokens scaled as usual would be others."""
    model, ids = tiny_model("esm", **kind), ids_of(None)
    first = model.embeddings(ids, torch.ones_like(ids))[0, 0]
    usual = model.embeddings(ids_of(None, masked=False), torch.ones_like(ids))[0, 0]
    assert (first - usual).abs().max() > 1e-2


@KINDS
def test_further_global_tokens_are_scaled_as_the_words_of_their_row(kind: dict[str, Any]) -> None:
    """All but what they have of a position, which the word scale is not for."""
    model = tiny_model("esm", **kind)
    lsg_patch.patch_model(model, num_global_tokens=3, global_positional_stride=16, **SETTINGS)
    ids, embeddings = ids_of(None), model.embeddings
    seen: list[Tensor] = []
    watch = model.encoder.layer[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run(model, ids, torch.ones_like(ids))
    watch.remove()
    rows = seen[0][:, :3]
    masked = (ids == MASK).float().mean(1)
    scale = (0.88 / (1 - masked))[:, None, None]
    words = embeddings.word_embeddings.weight[torch.tensor([3, MASK, MASK])]
    expected = scale * words
    if kind is ESM_1B:
        places = embeddings.position_embeddings.weight[torch.tensor([2, 18, 34])]
        expected = embeddings.layer_norm(expected + places)
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-5)


@KINDS
@pytest.mark.parametrize("cls", model_classes("esm"), ids=lambda cls: cls.__name__)
def test_revert_is_exact(cls: type[Any], kind: dict[str, Any]) -> None:
    model, mask = tiny_model("esm", cls, **kind), right_padded(20, 11)
    ids = ids_like(mask, "esm")
    outputs = run(model, ids, mask)
    before, stored = fingerprint(model), values(model)
    lsg_patch.patch_model(model, **SETTINGS)
    run(model, ids, mask)
    lsg_patch.unpatch_model(model)
    assert fingerprint(model) == before
    assert_bitwise(values(model), stored)
    assert_bitwise(run(model, ids, mask), outputs)


@KINDS
@pytest.mark.parametrize("times", [4, 8])
def test_long_proteins(kind: dict[str, Any], times: int) -> None:
    length = times * POSITIONS
    model, mask = tiny_model("esm", **kind), right_padded(length, length - 100)
    ids = ids_like(mask, "esm")
    rotary = kind is ESM_2
    expected = run(model, ids, mask) if rotary else None  # unpatched it has no end either
    # a block that holds all of it, and one that does not
    with lsg_patch.patched(model, **{**SETTINGS, "block_size": length // 2}):
        full = run(model, ids, mask)
    if expected is not None:
        assert_same(full, expected, mask, 2e-5)
    with lsg_patch.patched(model, **SETTINGS):
        output = run(model, ids, mask)["last_hidden_state"]
    assert torch.isfinite(output).all()
    assert (output - full["last_hidden_state"])[mask.bool()].abs().max() > 1e-2


def test_embedded_tokens_in_place_of_ids() -> None:
    """From 4.56 on the model takes them for the output of its embeddings, before that for words."""
    model, mask = tiny_model("esm", **ESM_1B, **{"hidden_dropout_prob": 0.0}), right_padded(30, 14)
    ids = ids_like(mask, "esm")
    if "embedding_output = self.embeddings(" in inspect.getsource(type(model).forward):
        pytest.skip("this transformers has no ESM that takes embedded tokens")
    with torch.no_grad():
        embedded = model.embeddings(ids, attention_mask=mask)
        for given in (mask, None):
            expected = model(attention_mask=given, inputs_embeds=embedded).last_hidden_state
            with lsg_patch.patched(model, **SETTINGS):
                actual = model(attention_mask=given, inputs_embeds=embedded).last_hidden_state
            seen = slice(None) if given is None else mask.bool()
            torch.testing.assert_close(actual[seen], expected[seen], rtol=0, atol=1e-5)


def test_given_positions() -> None:
    """They turn the tokens from 5.6 on, and are not read before."""
    model, mask = tiny_model("esm"), right_padded(30, 14)
    ids = ids_like(mask, "esm")
    positions = (3 + torch.arange(30) * 2).expand(2, -1)
    expected = run(model, ids, mask, position_ids=positions)
    with lsg_patch.patched(model, **SETTINGS):
        assert_same(run(model, ids, mask, position_ids=positions), expected, mask, 1e-5)


@pytest.mark.parametrize("sparsity_type", ["norm", "lsh"])
@pytest.mark.parametrize("unpad", [False, True])
def test_padding_on_the_left_chooses_no_other_tokens(sparsity_type: str, unpad: bool) -> None:
    check_left_padding(tiny_model("esm"), "esm", sparsity_type, unpad)


def test_relative_positions_are_refused() -> None:
    model = tiny_model("esm")
    model.config.position_embedding_type = "relative_key"
    with pytest.raises(ValueError, match="relative_key"):
        lsg_patch.patch_model(model)


@KINDS
def test_a_saved_patched_model_is_patched_again(tmp_path: Any, kind: dict[str, Any]) -> None:
    """Global tokens have the same positions then, though the model is a longer one now."""
    model, mask = tiny_model("esm", **kind), right_padded(200, 150)
    settings = {**SETTINGS, "num_global_tokens": 5}
    ids = ids_like(mask, "esm")
    lsg_patch.patch_model(model, **settings)
    expected = run(model, ids, mask)["last_hidden_state"]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    loaded = transformers.EsmModel.from_pretrained(tmp_path).eval()
    assert not lsg_patch.is_patched(loaded)
    lsg_patch.patch_model(loaded, **settings)
    loaded.load_state_dict(state)
    torch.testing.assert_close(run(loaded, ids, mask)["last_hidden_state"], expected)


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masked_tokens_in_half_precision(kind: dict[str, Any], dtype: torch.dtype) -> None:
    model, mask = tiny_model("esm", **kind).to(dtype), right_padded(32, 9)
    ids = ids_of(mask)
    expected = run(model, ids, mask)
    with lsg_patch.patched(model, **SETTINGS):
        assert_same(run(model, ids, mask), expected, mask, 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_knows_far_positions(dtype: torch.dtype) -> None:
    """Angles are computed in float32: in bfloat16 there is no position 257."""
    model = tiny_model("esm", num_hidden_layers=1)
    lsg_patch.patch_model(model, **SETTINGS)
    ids = ids_like(right_padded(400), "esm")
    exact = run(model, ids, None)["last_hidden_state"]
    model.to(dtype)
    output = run(model, ids, None)["last_hidden_state"]
    assert output.dtype == dtype
    assert (output.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_the_layers_turn_by_the_models_own_rule() -> None:
    from lsg_patch.attention.rotary import rotate

    assert attentions(tiny_model("esm"), "esm")
    half = modeling_module("esm").rotate_half
    query, angle = torch.randn(2, 4, 10, 8), torch.randn(10, 4)
    twice = torch.cat([angle, angle], -1)
    expected = query * twice.cos() + half(query) * twice.sin()
    actual = rotate(query, (angle.cos()[None], angle.sin()[None]), interleaved=False)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@KINDS
def test_compiles_without_a_break(kind: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model = tiny_model("esm", **kind)
    lsg_patch.patch_model(model, **{**SETTINGS, "num_global_tokens": 3})
    mask = right_padded(150, 90)
    ids = ids_of(mask)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_same(run(compiled, ids, mask), run(model, ids, mask), mask, 1e-5)
