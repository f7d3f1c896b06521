"""Encoder-decoders: the encoder reads long inputs, and what the decoder sees fits."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import lsg_patch
from lsg_patch.attention.backends.pieces import CACHE_BYTES
from lsg_patch.memory import peak_memory
from lsg_patch.modules.self_attention import LSGSelfAttention
from tests import models
from tests.models import CLS, POSITIONS, enable_checkpointing, right_padded
from tests.seq2seq import (
    FAMILIES,
    assert_same,
    ids_like,
    inputs_for,
    model_classes,
    run,
    tiny_model,
)
from tests.test_patching import _replicate as replicate
from tests.test_patching import assert_bitwise, fingerprint, values
from tests.tokenizers import tokenizer_like

families = pytest.mark.parametrize("family", FAMILIES)
BLOCK = 16
SETTINGS: dict[str, Any] = {
    "block_size": BLOCK,
    "sparse_block_size": BLOCK,
    "max_position_embeddings": 8 * POSITIONS,
}
SMALL: dict[str, Any] = {"block_size": 8, "sparse_block_size": 8, "max_position_embeddings": 200}
LONG = right_padded(90, 55)
LEFT = torch.tensor([[1] * 24, [0] * 7 + [1] * 17])
HEADS = [
    (family, cls.__name__.removeprefix(FAMILIES[family][0]))
    for family in FAMILIES
    for cls in model_classes(family)
]
heads = pytest.mark.parametrize(("family", "head"), HEADS)
# only inputs of BART begin with bos by themselves
STANDS_IN = {"mask_first_token": True}


class TestShortInputs:
    """Up to two blocks everything is seen: encoder, decoder and heads give the original's outputs."""

    @heads
    @pytest.mark.parametrize("lengths", [(2 * BLOCK, 2 * BLOCK), (25, 11), (2, 2)], ids=str)
    @pytest.mark.parametrize("passed", [False, True], ids=["pooled", "passed"])
    def test_inputs_that_begin_with_bos(
        self, family: str, head: str, lengths: tuple[int, int], passed: bool
    ) -> None:
        model, mask = tiny_model(family, head), right_padded(*lengths)
        ids = ids_like(mask)
        given = {} if family == "bart" else STANDS_IN
        for attention_mask in (mask, None):
            expected = run(model, ids, attention_mask)
            with lsg_patch.patched(
                model, pass_global_tokens_to_decoder=passed, **given, **SETTINGS
            ):
                actual = run(model, ids, attention_mask)
            if passed:
                # the global token stands before the first token, and is what that one was
                encoded = actual["encoder_last_hidden_state"]
                assert encoded.shape[1] == mask.shape[1] + 1
                actual["encoder_last_hidden_state"] = torch.cat(
                    [encoded[:, :1], encoded[:, 2:]], dim=1
                )
            assert_same(actual, expected, attention_mask, 2e-5)

    @heads
    @pytest.mark.parametrize(
        "mask", [right_padded(32, 11), LEFT, None], ids=["right", "left", "no"]
    )
    def test_any_input_without_global_tokens(
        self, family: str, head: str, mask: Tensor | None
    ) -> None:
        model = tiny_model(family, head)
        shape = torch.ones(2, 20, dtype=torch.long) if mask is None else mask
        ids = ids_like(shape, begin_with_bos=False)
        expected = run(model, ids, mask)
        with lsg_patch.patched(model, num_global_tokens=0, **SETTINGS):
            assert_same(run(model, ids, mask), expected, mask, 2e-5)

    @families
    def test_hidden_states(self, family: str) -> None:
        model, mask = tiny_model(family), right_padded(30, 12)
        given = inputs_for(model, ids_like(mask), mask)
        with torch.no_grad():
            expected = model(**given, output_hidden_states=True)
            with lsg_patch.patched(model, **STANDS_IN, **SETTINGS):
                actual = model(**given, output_hidden_states=True)
        assert len(actual.encoder_hidden_states) == len(expected.encoder_hidden_states) == 3
        for got, want in zip(
            actual.encoder_hidden_states, expected.encoder_hidden_states, strict=True
        ):
            torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=0, atol=2e-5)

    @families
    @pytest.mark.parametrize("passed", [False, True], ids=["pooled", "passed"])
    @pytest.mark.parametrize("num_beams", [1, 2])
    def test_generation(self, family: str, passed: bool, num_beams: int) -> None:
        model, mask = tiny_model(family, "ForConditionalGeneration"), right_padded(20, 12)
        ids = ids_like(mask)
        how = {"num_beams": num_beams, "do_sample": False, "max_length": 12, "min_length": 9}
        expected = model.generate(ids, attention_mask=mask, **how)
        with lsg_patch.patched(
            model, pass_global_tokens_to_decoder=passed, **STANDS_IN, **SETTINGS
        ):
            assert torch.equal(model.generate(ids, attention_mask=mask, **how), expected)
            long = right_padded(8 * POSITIONS, 5 * POSITIONS)
            text = model.generate(ids_like(long), attention_mask=long, **how)
        assert 9 <= text.shape[1] <= 12

    def test_one_token_more_is_no_longer_the_original(self) -> None:
        """Otherwise the tests above would pass with full attention everywhere."""
        model, mask = tiny_model("bart"), right_padded(2 * BLOCK + 1)
        expected = run(model, ids_like(mask), mask)
        with lsg_patch.patched(model, sparsity_type="none", **SETTINGS):
            actual = run(model, ids_like(mask), mask)
        for name in ("encoder_last_hidden_state", "last_hidden_state"):
            assert (actual[name] - expected[name]).abs().max() > 1e-2


class TestReversal:
    @heads
    def test_is_exact(self, family: str, head: str) -> None:
        model, mask = tiny_model(family, head), right_padded(20, 11)
        ids = ids_like(mask)
        outputs = run(model, ids, mask, output_hidden_states=True)
        before, stored = fingerprint(model), values(model)
        lsg_patch.patch_model(model, pass_global_tokens_to_decoder=True, **SMALL)
        run(model, ids, mask, output_hidden_states=True)
        lsg_patch.unpatch_model(model)
        assert fingerprint(model) == before
        assert_bitwise(values(model), stored)
        assert_bitwise(run(model, ids, mask, output_hidden_states=True), outputs)

    def test_copies_are_independent(self) -> None:
        model = tiny_model("bart")
        stored = values(model)
        lsg_patch.patch_model(model, **SMALL)
        expected = run(model, ids_like(LONG), LONG)["last_hidden_state"]
        for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(run(clone, ids_like(LONG), LONG)["last_hidden_state"], expected)
            with torch.no_grad():
                lsg_patch.global_embeddings(clone).add_(1.0)
                clone.encoder.embed_positions.weight[5].add_(1.0)
            assert not torch.equal(run(clone, ids_like(LONG), LONG)["last_hidden_state"], expected)
            assert torch.equal(run(model, ids_like(LONG), LONG)["last_hidden_state"], expected)
            lsg_patch.unpatch_model(clone)
            assert lsg_patch.is_patched(model)
            clone.encoder.embed_positions.weight.data.copy_(
                stored["encoder.embed_positions.weight"]
            )
            assert_bitwise(values(clone), stored)


def test_a_layer_copied_while_patched_is_reverted() -> None:
    model, mask = tiny_model("bart"), right_padded(20, 11)
    ids, layers = ids_like(mask), model.encoder.layers
    layers.append(copy.deepcopy(layers[0]))
    expected = run(model, ids, mask)
    del layers[2]
    lsg_patch.patch_model(model, **SMALL)
    layers.append(copy.deepcopy(layers[0]))
    lsg_patch.unpatch_model(model)
    assert not layers[2].self_attn._forward_pre_hooks
    assert_bitwise(run(model, ids, mask), expected)


def test_a_replica_uses_its_own_parameters() -> None:
    """What DataParallel does with a module: shallow copies that share hooks, with other tensors."""
    model = lsg_patch.patch_model(tiny_model("bart"), **SMALL)
    expected = run(model, ids_like(LONG), LONG)["last_hidden_state"]
    copied = replicate(model)
    assert torch.equal(run(copied, ids_like(LONG), LONG)["last_hidden_state"], expected)
    for owner in (copied.encoder.global_embeddings, copied.encoder.embed_positions):
        owner.weight = owner.weight + torch.randn(owner.weight.shape[1])
        changed = run(copied, ids_like(LONG), LONG)["last_hidden_state"]
        assert not torch.equal(changed, expected)
    assert torch.equal(run(model, ids_like(LONG), LONG)["last_hidden_state"], expected)


@families
def test_what_is_changed_and_what_is_not(family: str) -> None:
    model = tiny_model(family, "ForConditionalGeneration")
    attentions = {name: type(x) for name, x in model.named_modules() if name.endswith("_attn")}
    before = values(model)
    lsg_patch.patch_model(model, **SETTINGS)
    assert len(attentions) == 4
    for name, cls in attentions.items():
        module = model.get_submodule(name)
        assert isinstance(module, cls)
        assert isinstance(module, LSGSelfAttention) == name.startswith("model.encoder")
    after = model.state_dict()
    tables = {f"model.{part}.embed_positions.weight" for part in ("encoder", "decoder")}
    assert set(after) - set(before) == {"model.encoder.global_embeddings.weight"}
    assert {n for n in before if after[n].shape != before[n].shape} == tables
    offset = 0 if family == "pegasus" else 2
    for name in tables:
        assert len(after[name]) == 8 * POSITIONS + offset
        assert torch.equal(after[name][: len(before[name])], before[name])
        assert model.get_parameter(name).requires_grad == (family != "pegasus")
    assert model.config.max_position_embeddings == 8 * POSITIONS
    scale = 1.0 if family == "bart" else 32**0.5
    first = scale * before["model.shared.weight"][CLS]
    first = first + before["model.encoder.embed_positions.weight"][offset]
    torch.testing.assert_close(lsg_patch.global_embeddings(model)[0], first)


@families
def test_a_saved_model_loads_unpatched_and_is_patched_again(family: str, tmp_path: Path) -> None:
    model = lsg_patch.patch_model(tiny_model(family), **SMALL)
    expected = run(model, ids_like(LONG), LONG)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    lsg_patch.patch_model(loaded, **SMALL)
    assert_same(run(loaded, ids_like(LONG), LONG), expected, LONG, 1e-6)


@heads
@pytest.mark.parametrize("length", [33, 8 * POSITIONS])
def test_long_inputs_give_their_own_length(family: str, head: str, length: int) -> None:
    model = lsg_patch.patch_model(tiny_model(family, head), num_global_tokens=3, **SETTINGS)
    mask = right_padded(length, length - 3)
    output = run(model, ids_like(mask), mask)
    assert output["encoder_last_hidden_state"].shape == (2, length, 32)
    assert all(torch.isfinite(x).all() for x in output.values())
    with torch.no_grad():
        encoder, ids = model.base_model.encoder, ids_like(mask)
        states = encoder(ids, mask, output_hidden_states=True)
        as_tuple = encoder(ids, mask, output_hidden_states=True, return_dict=False)
    assert [x.shape for x in states.hidden_states] == [(2, length, 32)] * 3
    assert torch.equal(states.hidden_states[-1], states.last_hidden_state)
    for got, want in zip(as_tuple[1], states.hidden_states, strict=True):
        assert torch.equal(got, want)


@families
def test_a_far_token_reaches_the_decoder(family: str) -> None:
    """Through the global token, in two layers, however long the input is."""
    model = lsg_patch.patch_model(tiny_model(family), sparsity_type="none", **SMALL)
    mask = right_padded(200)
    ids = ids_like(mask)
    other = ids.clone()
    other[0, 150] = 7
    first, second = (run(model, x, mask)["encoder_last_hidden_state"] for x in (ids, other))
    assert (first[0, 20] - second[0, 20]).abs().max() > 1e-6


@families
def test_padding_does_not_count(family: str) -> None:
    model = lsg_patch.patch_model(tiny_model(family), sparsity_type="bos_pooling", **SMALL)
    text = ids_like(right_padded(61))
    alone = run(model, text, None)
    mask = right_padded(100, 61)
    ids = ids_like(mask, seed=9)
    ids[1, :61] = text[0]
    together = run(model, ids, mask)
    for name in ("encoder_last_hidden_state", "last_hidden_state"):
        got = together[name][1:, : alone[name].shape[1]]
        torch.testing.assert_close(got, alone[name], rtol=0, atol=2e-5)


@families
@pytest.mark.parametrize("num_global_tokens", [0, 1])
@pytest.mark.parametrize("length", [10, 50])
def test_rows_of_padding_alone_are_finite(family: str, num_global_tokens: int, length: int) -> None:
    model = lsg_patch.patch_model(tiny_model(family), num_global_tokens=num_global_tokens, **SMALL)
    mask = torch.stack([torch.zeros(length), torch.ones(length)]).long()
    for value in run(model, ids_like(mask), mask).values():
        assert torch.isfinite(value).all()


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    # another forward in between: what a layer needs must not be kept beside its arguments
    output = model(**inputs_for(model, ids_like(LONG), LONG)).last_hidden_state
    short = right_padded(30)
    with torch.no_grad():
        model(**inputs_for(model, ids_like(short), None))
    output.pow(2).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@families
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(family: str, use_reentrant: bool) -> None:
    model = lsg_patch.patch_model(tiny_model(family), **SMALL).train()
    expected = gradients(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(expected)
    runs: list[int] = []
    model.encoder.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: runs.append(1))
    enable_checkpointing(model, use_reentrant)
    actual = gradients(model)
    assert len(runs) == 3, "the layer runs again in backward"
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@families
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    model = lsg_patch.patch_model(tiny_model(family), **SMALL).to(dtype)
    output = run(model, ids_like(LONG), LONG)["last_hidden_state"]
    assert output.dtype == dtype and torch.isfinite(output).all()


def test_any_layer_may_be_dropped() -> None:
    """LayerDrop: no layer does what the others rely on."""
    model = tiny_model("bart", encoder_layerdrop=0.5)
    lsg_patch.patch_model(model, **SMALL).train()
    torch.manual_seed(0)
    lengths = {model.encoder(ids_like(LONG), LONG).last_hidden_state.shape for _ in range(10)}
    assert lengths == {(2, 90, 32)}


@families
def test_the_encoder_compiles_without_a_break(family: str) -> None:
    torch._dynamo.reset()
    model = lsg_patch.patch_model(tiny_model(family), **SMALL)
    compiled = torch.compile(model.encoder, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = model.encoder(ids_like(LONG), LONG).last_hidden_state
        actual = compiled(ids_like(LONG), LONG).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_the_encoders_memory_is_linear() -> None:
    model = lsg_patch.patch_model(tiny_model("bart"), max_position_embeddings=16384)
    used = {}
    for length in (4096, 16384):
        mask = right_padded(length, length - 300)[1:]
        mask = torch.cat([mask, torch.ones(1, length - mask.shape[1], dtype=torch.long)], dim=1)
        with torch.no_grad(), peak_memory() as memory:
            model.encoder(ids_like(mask), mask)
        # pieces of the attention have a size of their own, whatever the length
        piece = CACHE_BYTES // 4
        assert memory.largest_numel < max(200 * length, piece), memory.largest_shape
        used[length] = memory.peak_bytes
    assert used[16384] <= 4.4 * used[4096]


class TestCalls:
    @families
    def test_embeddings_in_place_of_ids(self, family: str) -> None:
        model = lsg_patch.patch_model(tiny_model(family), **SMALL)
        ids = ids_like(LONG)
        encoder = model.encoder
        with torch.no_grad():
            words = encoder.embed_tokens(ids) * getattr(encoder, "embed_scale", 1.0)
            expected = encoder(ids, LONG).last_hidden_state
            actual = encoder(inputs_embeds=words, attention_mask=LONG).last_hidden_state
        assert torch.equal(actual, expected)

    @families
    def test_attentions_are_none_with_a_warning(self, family: str) -> None:
        model = lsg_patch.patch_model(tiny_model(family), **SMALL)
        given = inputs_for(model, ids_like(LONG), LONG)
        with pytest.warns(UserWarning, match="attention maps"), torch.no_grad():
            output = model(**given, output_attentions=True)
        assert output.encoder_attentions == (None, None)

    def test_what_is_wrong_is_refused(self) -> None:
        model = lsg_patch.patch_model(tiny_model("bart"), **SMALL)
        ids = ids_like(LONG)
        with pytest.raises(ValueError, match="201 tokens, the patched model 200 positions"):
            model.encoder(ids_like(right_padded(201)))
        with pytest.raises(ValueError, match=r"attention_mask must be \(B, T\)"):
            model.encoder(ids, torch.ones(2, 1, 90, 90))
        with pytest.raises(ValueError, match="head_mask is not supported"):
            model.encoder(ids, LONG, head_mask=torch.ones(2, 4))
        with pytest.raises(ValueError, match="specify"):
            model.encoder()
        with pytest.raises(RuntimeError, match="inside its model only"):
            model.encoder.layers[0].self_attn(torch.randn(1, 5, 32))

    def test_the_callers_mask_is_not_written_to(self) -> None:
        model = tiny_model("bart")
        lsg_patch.patch_model(model, pass_global_tokens_to_decoder=True, **SMALL)
        mask = LONG.clone()
        run(model, ids_like(LONG), mask)
        assert torch.equal(mask, LONG)

    def test_states_of_another_encoder_are_left_alone(self) -> None:
        """The decoder's mask gets global tokens only where the encoder's output has them."""
        model = tiny_model("bart")
        states = torch.randn(2, 20, 32)
        given: dict[str, Any] = {
            "input_ids": torch.full((2, 3), 7),
            "encoder_hidden_states": states,
            "encoder_attention_mask": right_padded(20, 8),
        }
        with torch.no_grad():
            expected = model.decoder(**given).last_hidden_state
            lsg_patch.patch_model(model, pass_global_tokens_to_decoder=True, **SMALL)
            assert torch.equal(model.decoder(**given).last_hidden_state, expected)


def test_a_tokenizer_without_bos() -> None:
    """Those of Pegasus have none: the config then says what the first global token is."""
    model, tokenizer = tiny_model("pegasus"), tokenizer_like()
    tokenizer.cls_token_id = None
    lsg_patch.patch_model(model, tokenizer=tokenizer)
    first = model.shared.weight[CLS] * 32**0.5 + model.encoder.embed_positions.weight[0]
    torch.testing.assert_close(lsg_patch.global_embeddings(model)[0], first)
    other = tiny_model("pegasus", bos_token_id=None)
    with pytest.raises(
        ValueError, match="neither the tokenizer nor the model's config has cls_tok"
    ):
        lsg_patch.patch_model(other, tokenizer=tokenizer)
    lsg_patch.patch_model(other, num_global_tokens=0)


def test_encoder_and_decoder_of_two_berts() -> None:
    """The encoder of an EncoderDecoderModel is patched; decoder and cross attention stay."""
    torch.manual_seed(0)
    config = models.tiny_config("bert", is_decoder=True, add_cross_attention=True)
    decoder = transformers.BertLMHeadModel(config).eval()
    pair = transformers.EncoderDecoderModel(encoder=models.tiny_model("bert"), decoder=decoder)
    pair = pair.eval()
    mask = right_padded(30, 12)
    ids = models.ids_like(mask, "bert")
    given = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :7]}
    how = {"decoder_start_token_id": 5, "pad_token_id": 0, "eos_token_id": None, "max_length": 9}
    before = fingerprint(pair.decoder)
    with torch.no_grad():
        expected = pair(**given).logits
        text = pair.generate(ids, attention_mask=mask, num_beams=2, do_sample=False, **how)
        lsg_patch.patch_model(pair.encoder, **SETTINGS)
        assert fingerprint(pair.decoder) == before
        torch.testing.assert_close(pair(**given).logits, expected, rtol=0, atol=2e-5)
        again = pair.generate(ids, attention_mask=mask, num_beams=2, do_sample=False, **how)
        assert torch.equal(again, text)
        long = right_padded(8 * POSITIONS)
        long_ids = models.ids_like(long, "bert")
        assert pair.generate(long_ids, attention_mask=long, **how).shape == (1, 9)
    lsg_patch.unpatch_model(pair)
    assert not lsg_patch.is_patched(pair)
    with pytest.raises(ValueError, match=r"2 models .*model.encoder, model.decoder.bert"):
        lsg_patch.patch_model(pair)


@families
@pytest.mark.parametrize("tool", ["checkpoint_wrapper", "compile", "copy"])
def test_what_is_put_around_the_position_table_changes_nothing(family: str, tool: str) -> None:
    model, ids = lsg_patch.patch_model(tiny_model(family), **SMALL), ids_like(LONG)
    expected = run(model, ids, LONG)
    table = model.encoder.embed_positions
    seen: list[int] = []
    table.register_forward_hook(lambda *_: seen.append(1))
    if tool == "checkpoint_wrapper":
        model.encoder.embed_positions = checkpoint_wrapper(table)
    elif tool == "compile":
        model.encoder.embed_positions = torch.compile(table, backend="eager")
    else:
        model.encoder.embed_positions = copy.deepcopy(table)
        if family != "pegasus":  # whose positions are computed, and do not train
            model(**inputs_for(model, ids, LONG)).last_hidden_state.square().sum().backward()
            assert model.encoder.embed_positions.weight.grad[20:40].abs().min() > 0
    assert_same(run(model, ids, LONG), expected, LONG, 0)
    assert seen or tool == "copy"


class PastThePatch(transformers.models.bart.modeling_bart.BartEncoder):
    def forward(self, input_ids: Any = None, attention_mask: Any = None, **more: Any) -> Any:
        above = transformers.models.bart.modeling_bart.BartEncoder
        return above.forward(self, input_ids, attention_mask, **more)


@pytest.mark.parametrize("kind", ["named parent", "older forward"])
def test_a_forward_past_the_patch_is_told_of(kind: str) -> None:
    """Its mask is that of an unpatched model, of which no layout can be made."""
    model, ids = tiny_model("bart"), ids_like(LONG)
    if kind == "named parent":
        model.encoder.__class__ = PastThePatch
    before = model.encoder.forward
    lsg_patch.patch_model(model, **SMALL)
    if kind == "older forward":
        model.encoder.forward = lambda *args, **kwargs: before(*args, **kwargs)
    with pytest.raises(RuntimeError, match="call it by super"):
        run(model, ids, LONG)
