"""Decoders: what comes after a token changes nothing before it, with a cache and without."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import lsg_patch
from lsg_patch import compat
from lsg_patch.memory import peak_memory
from lsg_patch.modules.self_attention import LSGSelfAttention
from tests import models
from tests.models import (
    FAMILIES,
    assert_same,
    assert_same_gradients,
    attentions,
    enable_checkpointing,
    ids_like,
    model_classes,
    right_padded,
    run,
    stand_in,
    takes,
    tiny_model,
)
from tests.test_lossless import HOLES, LEFT
from tests.test_patching import assert_bitwise, fingerprint, values

BLOCK = 16
SETTINGS: dict[str, Any] = {
    "block_size": BLOCK,
    "sparse_block_size": BLOCK,
    "max_position_embeddings": 256,
}
SMALL: dict[str, Any] = {"block_size": 8, "sparse_block_size": 8, "max_position_embeddings": 200}
TOKEN_HEADS = ("LMHeadModel", "CausalLM", "Decoder")


def _is_decoder_family(family: str) -> bool:
    base = tiny_model(family, num_hidden_layers=1)
    stack = base.get_submodule(lsg_patch.families.FAMILIES[family].stack)
    return compat.can_decode(base, stack)


DECODERS = [family for family in FAMILIES if _is_decoder_family(family)]
HEADS = [(family, cls) for family in DECODERS for cls in model_classes(family)]
families = pytest.mark.parametrize("family", DECODERS)
every_head = pytest.mark.parametrize(
    ("family", "cls"), HEADS, ids=[cls.__name__ for _, cls in HEADS]
)


def tiny_decoder(family: str, cls: type[Any] | None = None, **overrides: Any) -> Any:
    return tiny_model(family, cls, is_decoder=True, **overrides)


def language_model(family: str, **overrides: Any) -> Any:
    cls = next(cls for cls in model_classes(family) if cls.__name__.endswith(TOKEN_HEADS))
    return tiny_decoder(family, cls, **overrides)


def positions_in_text(model: Any, family: str, mask: Tensor) -> Tensor:
    """Position ids that count from each row's first token, wherever it stands."""
    known = lsg_patch.families.FAMILIES[family]
    offset = 0
    if known.positions is not None:
        embeddings = getattr(model, "base_model", model).embeddings
        offset = known.position_offset(getattr(embeddings, known.positions))
    return (mask.cumsum(1) - 1).clamp(min=0) + offset


def at(model: Any, positions: Tensor) -> dict[str, Tensor]:
    """The argument for positions, where a model has one (with rotary positions it needs none)."""
    return {"position_ids": positions} if takes(model, "position_ids") else {}


def keys_of(cache: Any, layer: int) -> Tensor:
    """(B, H, T, D), of an object (4.54 and later) or of tuples."""
    cache = getattr(cache, "self_attention_cache", cache)
    if hasattr(cache, "layers"):
        return cache.layers[layer].keys  # type: ignore[no-any-return]
    # 4.54 and 4.55 may lack layers
    return cache.key_cache[layer] if hasattr(cache, "key_cache") else cache[layer][0]


def test_the_families_that_decode() -> None:
    """An empty list would let everything below pass."""
    assert {"bert", "electra", "roberta", "bert-generation", "rembert"} <= set(DECODERS)
    assert not {"albert", "distilbert", "layoutlm", "markuplm"} & set(DECODERS)
    for family in set(DECODERS) - {"splinter"}:  # a decoder up to 4.53, without a head for it
        assert language_model(family)


class TestShort:
    """Up to two blocks everything before a token is seen: the original's outputs."""

    @every_head
    @pytest.mark.parametrize("lengths", [(2 * BLOCK, 25), (1, 1)], ids=str)
    def test_defaults_give_the_original_for_inputs_that_begin_with_cls(
        self, family: str, cls: type[Any], lengths: tuple[int, int]
    ) -> None:
        model, mask = tiny_decoder(family, cls), right_padded(*lengths)
        ids = ids_like(mask, family)
        how = {"use_cache": False} if takes(model, "use_cache") else {}
        try:
            expected = run(model, ids, mask, **how)
        except TypeError as error:  # 5.0 to 5.8: two heads take the cache for the pooled output
            pytest.skip(f"{cls.__name__} is no decoder unpatched either: {error}")
        with lsg_patch.patched(model, **SETTINGS, **stand_in(family)):
            assert_same(run(model, ids, mask, **how), expected, mask, 1e-5)

    @families
    @pytest.mark.parametrize(
        "mask", [right_padded(32, 11), LEFT, HOLES, None], ids=["right", "left", "holes", "no mask"]
    )
    def test_without_global_tokens_any_input_gives_the_original(
        self, family: str, mask: Tensor | None
    ) -> None:
        model = tiny_decoder(family)
        ids = ids_like(torch.ones(2, 20) if mask is None else mask, family, begin_with_cls=False)
        how = {"use_cache": False}
        expected = run(model, ids, mask, **how)["last_hidden_state"]
        with lsg_patch.patched(model, num_global_tokens=0, **SETTINGS):
            actual = run(model, ids, mask, **how)["last_hidden_state"]
        assert torch.isfinite(actual).all()
        seen = torch.ones_like(ids).bool() if mask is None else mask.bool()
        torch.testing.assert_close(actual[seen], expected[seen], rtol=0, atol=1e-5)

    @families
    def test_hidden_states_are_the_original_ones(self, family: str) -> None:
        model, mask = tiny_decoder(family), right_padded(30, 12)
        given = {"input_ids": ids_like(mask, family), "attention_mask": mask}
        given |= {"output_hidden_states": True, "use_cache": False}
        with torch.no_grad():
            expected = model(**given).hidden_states
            with lsg_patch.patched(model, **SETTINGS, **stand_in(family)):
                actual = model(**given).hidden_states
        assert len(actual) == len(expected) == 3
        for got, want in zip(actual, expected, strict=True):
            torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=0, atol=1e-5)

    @families
    @pytest.mark.parametrize("padding", ["none", "left"])
    @pytest.mark.parametrize("num_global_tokens", [0, 1])
    def test_step_by_step_with_a_cache(
        self, family: str, padding: str, num_global_tokens: int
    ) -> None:
        """A first step of ten tokens, then 1, 1, and 3: what the original gives for all at once."""
        model = tiny_decoder(family)
        mask = right_padded(15, 15) if padding == "none" else LEFT[:, :15]
        ids, positions = ids_like(mask, family), positions_in_text(model, family, mask)
        expected = run(model, ids, mask, use_cache=False, **at(model, positions))
        plain = tiny_decoder(family)(ids[:, :10], use_cache=True).past_key_values
        settings = {**SETTINGS, "num_global_tokens": num_global_tokens}
        if num_global_tokens:
            settings |= stand_in(family)
        lsg_patch.patch_model(model, **settings)
        cache, found = None, []
        for start, end in ((0, 10), (10, 11), (11, 12), (12, 15)):
            with torch.no_grad():
                output = model(
                    input_ids=ids[:, start:end],
                    attention_mask=mask[:, :end],
                    past_key_values=cache,
                    use_cache=True,
                    **at(model, positions[:, start:end]),
                )
            cache = output.past_key_values
            assert type(cache) is type(plain)
            assert compat.cached_length(cache) == end
            assert keys_of(cache, 1).shape[2] == end
            found.append(output.last_hidden_state)
        actual = torch.cat(found, dim=1)
        assert torch.isfinite(actual).all()
        wanted = expected["last_hidden_state"]
        torch.testing.assert_close(actual[mask.bool()], wanted[mask.bool()], rtol=0, atol=1e-5)

    def test_the_cache_holds_what_the_original_one_holds(self) -> None:
        model, mask = tiny_decoder("roberta"), LEFT
        ids = ids_like(mask, "roberta")
        with torch.no_grad():
            expected = model(ids, mask, use_cache=True).past_key_values
            lsg_patch.patch_model(model, **SETTINGS)
            actual = model(ids, mask, use_cache=True).past_key_values
        for layer in range(2):
            got, want = (keys_of(x, layer).transpose(1, 2)[mask.bool()] for x in (actual, expected))
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def generated(model: Any, ids: Tensor, mask: Tensor, **how: Any) -> Tensor:
    settings = {"max_length": ids.shape[1] + 5, "do_sample": False, "pad_token_id": 0}
    text: Tensor = model.generate(ids, attention_mask=mask, **{**settings, **how})
    return text[:, ids.shape[1] :]


def make_endless(model: Any) -> Any:
    """No token ends a text before its length does."""
    model.generation_config.eos_token_id = model.generation_config.bos_token_id = None
    model.config.eos_token_id = None
    return model


class TestGenerate:
    @pytest.mark.parametrize("num_beams", [1, 3])
    @pytest.mark.parametrize("use_cache", [True, False])
    @pytest.mark.parametrize("family", ["bert", "bert-generation"])
    def test_the_same_text_at_short_length(
        self, family: str, use_cache: bool, num_beams: int
    ) -> None:
        model = make_endless(language_model(family))
        mask = right_padded(12, 12)
        ids, how = ids_like(mask, family), {"use_cache": use_cache, "num_beams": num_beams}
        expected = generated(model, ids, mask, **how)
        assert expected.shape == (2, 5)
        with lsg_patch.patched(model, **SETTINGS, **stand_in(family)):
            assert torch.equal(generated(model, ids, mask, **how), expected)

    @pytest.mark.parametrize("num_beams", [1, 3])
    def test_the_same_text_without_global_tokens_after_left_padding(self, num_beams: int) -> None:
        model = make_endless(language_model("roberta"))
        mask = LEFT[:, :14]
        ids = ids_like(mask, "roberta", begin_with_cls=False)
        expected = generated(model, ids, mask, num_beams=num_beams)
        with lsg_patch.patched(model, num_global_tokens=0, **SETTINGS):
            assert torch.equal(generated(model, ids, mask, num_beams=num_beams), expected)

    @pytest.mark.parametrize("num_beams", [1, 2])
    @pytest.mark.parametrize("use_cache", [True, False])
    def test_from_a_long_prompt(self, use_cache: bool, num_beams: int) -> None:
        """Cached steps see everything, others the blocks; both begin with the same token."""
        model = make_endless(language_model("bert", max_position_embeddings=64))
        mask = right_padded(100, 100)
        ids = ids_like(mask, "bert")
        lsg_patch.patch_model(model, **SMALL)
        how = {"use_cache": use_cache, "num_beams": num_beams}
        text = generated(model, ids, mask, **how)
        assert text.shape == (2, 5)
        next_token = run(model, ids, mask)["logits"][:, -1].argmax(-1)
        if num_beams == 1:
            assert torch.equal(text[:, 0], next_token)


class TestLong:
    @families
    def test_left_padding_changes_nothing(self, family: str) -> None:
        """Blocks begin where the text begins; the steps after that see the same keys."""
        model, long, padding = tiny_decoder(family), 61, 13
        text = ids_like(right_padded(long + 2), family)
        mask = torch.cat([torch.zeros(1, padding).long(), torch.ones(1, long + 2).long()], 1)
        ids = ids_like(mask, family)
        ids[:, padding:] = text
        positions = positions_in_text(model, family, mask)
        lsg_patch.patch_model(model, sparsity_type="bos_pooling", **SMALL)
        outputs = []
        for cut, (given, given_mask) in enumerate(((text, mask[:, padding:]), (ids, mask))):
            where = positions[:, -given.shape[1] :]
            cache, found = None, []
            for start, end in ((0, -2), (-2, -1), (-1, None)):
                with torch.no_grad():
                    output = model(
                        given[:, start:end],
                        attention_mask=given_mask[:, :end],
                        past_key_values=cache,
                        use_cache=True,
                        **at(model, where[:, start:end]),
                    )
                cache = output.past_key_values
                found.append(output.last_hidden_state)
            outputs.append(torch.cat(found, 1)[:, cut * padding :])
        torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-5)

    @families
    @pytest.mark.parametrize("times", [2, 7])
    def test_a_token_is_reached_from_before_it_alone(self, family: str, times: int) -> None:
        """Exactly: its own block up to itself, the one before, the sparse ones before that."""
        length = times * 24 + 5
        model = tiny_decoder(family, num_hidden_layers=1)
        words = model.get_input_embeddings().weight.detach()
        ids = torch.randint(len(words), (1, length), generator=torch.Generator().manual_seed(0))
        settings = {**SMALL, "sparsity_type": "pooling", "num_global_tokens": 3}
        lsg_patch.patch_model(model, mask_first_token=False, **settings)
        embeds = words[ids].requires_grad_(True)
        hidden = model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        token = length // 2 + 3
        of_words, of_globals = torch.autograd.grad(
            hidden[0, token] @ torch.randn(hidden.shape[-1]),
            [embeds, lsg_patch.global_embeddings(model)],
        )
        reached = of_words[0].abs().sum(-1) > 0
        position, first = torch.arange(length), (token // 8 - 1) * 8 - 2 * 8
        assert torch.equal(reached, (position >= first) & (position <= token))
        assert (of_globals.abs().sum(-1) > 0).all()

    @pytest.mark.parametrize("sparsity_type", lsg_patch.attention.SPARSITY_TYPES)
    def test_no_layer_lets_the_future_through(self, sparsity_type: str) -> None:
        model = tiny_decoder("bert", num_hidden_layers=3)
        lsg_patch.patch_model(model, sparsity_type=sparsity_type, num_global_tokens=2, **SMALL)
        words = model.get_input_embeddings().weight.detach()
        embeds = words[ids_like(right_padded(61), "bert")].requires_grad_(True)
        hidden = model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        for token in (0, 7, 8, 23, 24, 40, 60):
            (gradient,) = torch.autograd.grad(
                hidden[0, token].sum() + hidden[0, token, 0], embeds, retain_graph=True
            )
            assert not gradient[0, token + 1 :].any()
            assert gradient[0, token].any() or token == 0  # the global token replaces it

    def test_cached_steps_see_everything(self) -> None:
        model = tiny_decoder("bert", num_hidden_layers=1)
        lsg_patch.patch_model(model, **SMALL)
        words = model.get_input_embeddings().weight.detach()
        embeds = words[ids_like(right_padded(90), "bert")].requires_grad_(True)
        cache = model(inputs_embeds=embeds[:, :87], use_cache=True).past_key_values
        step = model(inputs_embeds=embeds[:, 87:], past_key_values=cache, use_cache=True)
        for i, token in enumerate((87, 88, 89)):
            (gradient,) = torch.autograd.grad(
                step.last_hidden_state[0, i] @ torch.randn(32), embeds, retain_graph=True
            )
            reached = gradient[0].abs().sum(-1) > 0
            assert not reached[token + 1 :].any()
            assert reached[1 : token + 1].all() and not reached[0]  # the first one is masked

    @families
    @pytest.mark.parametrize("padded", [True, False])
    def test_nothing_is_quadratic(self, family: str, padded: bool) -> None:
        length = 1024
        mask = right_padded(length, length - 300)
        ids = ids_like(mask, family)
        model = tiny_decoder(family, num_hidden_layers=1)
        lsg_patch.patch_model(model, block_size=16, sparse_block_size=16)
        with torch.no_grad(), peak_memory() as memory:
            cache = model(
                input_ids=ids, attention_mask=mask if padded else None, use_cache=True
            ).past_key_values
        assert memory.largest_numel < length**2, memory.largest_shape
        both = torch.cat([mask, torch.ones_like(mask)], dim=1)
        with torch.no_grad(), peak_memory() as memory:
            model(
                input_ids=ids.flip(1),
                attention_mask=both if padded else None,
                past_key_values=cache,
                use_cache=True,
            )
        assert memory.largest_numel < length**2, memory.largest_shape

    def test_pooling_only_where_the_first_token_is_masked(self) -> None:
        """Where it is seen, what follows it depends on it."""
        mask = right_padded(40)
        ids = ids_like(mask, "bert", begin_with_cls=False)
        other = ids.clone()
        other[0, 0] = 7
        for masks, depends in ((True, False), (False, True)):
            model = lsg_patch.patch_model(tiny_decoder("bert"), mask_first_token=masks, **SMALL)
            first, second = (run(model, x, mask)["last_hidden_state"] for x in (ids, other))
            assert (not torch.equal(first[:, 0], second[:, 0])) is depends
            assert (not torch.equal(first[:, 1:], second[:, 1:])) is depends


class TestCrossAttention:
    """A decoder that also sees an encoder's states: that attention stays as it is."""

    def decoder(self, family: str, **overrides: Any) -> Any:
        return language_model(family, add_cross_attention=True, **overrides)

    @families
    @pytest.mark.parametrize("mask", [right_padded(27, 15), None], ids=["mask", "no mask"])
    def test_short_inputs_give_the_original(self, family: str, mask: Tensor | None) -> None:
        if family == "splinter":
            pytest.skip("splinter has no head for decoding")
        model, text = self.decoder(family), right_padded(20, 9)
        states = torch.randn(2, 27, 32, generator=torch.Generator().manual_seed(3))
        given = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
        given |= {"use_cache": False, "output_hidden_states": True}
        ids = ids_like(text, family)
        before = [type(m) for m in model.modules()]
        try:
            expected = run(model, ids, text, **given)
        except RuntimeError as error:  # 5.x: megatron-bert takes the text's length for the states'
            pytest.skip(f"{family} does not see an encoder unpatched either: {error}")
        one = run(model, ids[:, :1], text[:, :1], **given)
        with lsg_patch.patched(model, **SETTINGS, **stand_in(family)):
            assert_same(run(model, ids, text, **given), expected, text, 2e-5)
            assert_same(run(model, ids[:, :1], text[:, :1], **given), one, None, 2e-5)
            swapped = [m for m in model.modules() if isinstance(m, LSGSelfAttention)]
            assert len(swapped) == 2
            long = right_padded(90, 71)
            logits = run(model, ids_like(long, family), long, **given)["logits"]
            assert logits.shape[:2] == (2, 90) and torch.isfinite(logits).all()
            # the states of padding reach nothing
            if mask is not None:
                noise = states.masked_fill(mask[..., None] == 0, 9.0)
                again = run(
                    model, ids_like(long, family), long, **{**given, "encoder_hidden_states": noise}
                )["logits"]
                torch.testing.assert_close(again, logits, rtol=0, atol=1e-6)
        assert [type(m) for m in model.modules()] == before

    def test_its_maps_are_those_of_the_input(self) -> None:
        model, text = self.decoder("bert", attn_implementation="eager"), right_padded(20, 9)
        states, ids = torch.randn(2, 27, 32), ids_like(text, "bert")
        given = {"encoder_hidden_states": states, "output_attentions": True, "use_cache": False}
        with torch.no_grad():
            expected = model(ids, text, **given).cross_attentions
            lsg_patch.patch_model(model, **SETTINGS)
            with pytest.warns(UserWarning, match="attention maps"):
                output = model(ids, text, **given)
        assert output.attentions == (None, None)
        for got, want in zip(output.cross_attentions, expected, strict=True):
            assert got.shape == want.shape == (2, 4, 20, 27)
            torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-5)

    def test_encoder_and_decoder_of_two_berts(self) -> None:
        decoder = self.decoder("bert")
        pair = transformers.EncoderDecoderModel(encoder=tiny_model("bert"), decoder=decoder).eval()
        mask, text = right_padded(30, 12), right_padded(7, 7)
        ids, words = ids_like(mask, "bert"), ids_like(text, "bert")
        given = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": words}
        how: dict[str, Any] = {"decoder_start_token_id": models.CLS, "pad_token_id": 0}
        how |= {"eos_token_id": None, "max_length": 9, "do_sample": False, "num_beams": 2}
        stored = values(pair)
        with torch.no_grad():
            expected = pair(**given).logits
            texts = [
                pair.generate(ids, attention_mask=mask, use_cache=use_cache, **how)
                for use_cache in (True, False)
            ]
            lsg_patch.patch_model(pair.encoder, **SETTINGS)
            lsg_patch.patch_model(pair.decoder, **SETTINGS)
            torch.testing.assert_close(pair(**given).logits, expected, rtol=0, atol=2e-5)
            for use_cache, wanted in zip((True, False), texts, strict=True):
                found = pair.generate(ids, attention_mask=mask, use_cache=use_cache, **how)
                assert torch.equal(found, wanted)
            long = right_padded(200, 150)
            long_ids = ids_like(long, "bert")
            given = {"input_ids": long_ids, "attention_mask": long, "decoder_input_ids": long_ids}
            logits = pair(**given).logits
            assert logits.shape[:2] == (2, 200) and torch.isfinite(logits).all()
        lsg_patch.unpatch_model(pair)
        assert_bitwise(values(pair), stored)

    def test_a_short_text_over_a_long_one_is_not_quadratic(self) -> None:
        model = self.decoder("bert", num_hidden_layers=1)
        states, mask = torch.randn(1, 4096, 32), right_padded(4096)
        mask[:, 4000:] = 0
        given = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
        with torch.no_grad(), peak_memory() as memory:
            model(ids_like(right_padded(64), "bert"), **given, use_cache=False)
        if memory.largest_numel >= 4 * 64 * 4096:
            pytest.skip("cross attention writes its scores out in this transformers")
        lsg_patch.patch_model(model, block_size=16, sparse_block_size=16)
        with torch.no_grad(), peak_memory() as memory:
            model(ids_like(right_padded(512), "bert"), **given, use_cache=False)
        assert memory.largest_numel < 512 * 4096, memory.largest_shape


class TestInUse:
    @pytest.mark.parametrize("family", DECODERS)
    def test_revert_and_copies(self, family: str) -> None:
        mask = right_padded(60, 35)
        for model in (tiny_decoder(family), tiny_decoder(family, model_classes(family)[0])):
            before, stored = fingerprint(model), values(model)
            lsg_patch.patch_model(model, **SMALL)
            expected = run(model, ids_like(mask, family), mask)
            for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert_bitwise(run(clone, ids_like(mask, family), mask), expected)
                assert_bitwise(values(lsg_patch.unpatch_model(clone)), stored)
            lsg_patch.unpatch_model(model)
            assert fingerprint(model) == before
            assert_bitwise(values(model), stored)

    @families
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing_gives_the_same_gradients(
        self, family: str, use_reentrant: bool
    ) -> None:
        model, mask = tiny_decoder(family).train(), right_padded(45, 30)
        if not model.supports_gradient_checkpointing:
            pytest.skip(f"{family} has no gradient checkpointing in this transformers")
        lsg_patch.patch_model(model, **SMALL)
        ids = ids_like(mask, family)

        def gradients() -> dict[str, Tensor]:
            model.zero_grad()
            output = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            if not output.requires_grad:
                pytest.skip(f"{family} does not train so unpatched either in this transformers")
            (output * mask[..., None]).pow(2).sum().backward()
            return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

        expected = gradients()
        runs: list[int] = []
        attentions(model, family)[0].query.register_forward_hook(lambda *_: runs.append(1))
        enable_checkpointing(model, use_reentrant)
        actual = gradients()
        assert len(runs) == 2, "the layer runs again in backward"
        assert_same_gradients(actual, expected)

    @pytest.mark.parametrize("sparsity_type", ["norm", "bos_pooling", "lsh"])
    def test_a_language_model_trains(self, sparsity_type: str) -> None:
        model = language_model("bert", hidden_dropout_prob=0.1).train()
        lsg_patch.patch_model(model, sparsity_type=sparsity_type, **SMALL)
        mask = right_padded(50, 40)
        ids = ids_like(mask, "bert")
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(12):
            loss = model(ids, mask, labels=ids.masked_fill(mask == 0, -100)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert lsg_patch.global_embeddings(model).grad.abs().sum() > 0  # type: ignore[union-attr]
        assert sum(losses[-3:]) < 0.8 * sum(losses[:3])

    @families
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, family: str, dtype: torch.dtype) -> None:
        model = tiny_decoder(family).to(dtype)
        mask = LEFT.repeat(1, 2).sort(dim=1).values  # all padding on the left
        ids = ids_like(mask, family)
        for num_global_tokens in (0, 2):
            with (
                torch.no_grad(),
                lsg_patch.patched(model, num_global_tokens=num_global_tokens, **SMALL),
            ):
                output = model(input_ids=ids, attention_mask=mask, use_cache=True)
                assert torch.isfinite(output.last_hidden_state).all()
                more = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
                kept = output.past_key_values
                step = model(input_ids=ids[:, -1:], attention_mask=more, past_key_values=kept)
                assert torch.isfinite(step.last_hidden_state).all()

    def test_compiles_without_a_break(self) -> None:
        torch._dynamo.reset()
        model = lsg_patch.patch_model(tiny_decoder("bert"), **SMALL)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        mask = right_padded(60, 40)
        ids = ids_like(mask, "bert")
        expected = run(model, ids, mask, use_cache=False)
        assert_same(run(compiled, ids, mask, use_cache=False), expected, None, 1e-5)

    @pytest.mark.parametrize("wrong", [1, 30, 32])
    def test_the_mask_is_over_cached_tokens_too(self, wrong: int) -> None:
        model = lsg_patch.patch_model(tiny_decoder("bert"), **SMALL)
        ids = ids_like(right_padded(30, 30), "bert")
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
            with pytest.raises(
                ValueError, match=r"attention_mask must be \(B, T\) = \(2, 31\), 1 for"
            ):
                model(ids[:, :1], torch.ones(2, wrong), past_key_values=cache)

    def test_a_stack_alone(self) -> None:
        model = lsg_patch.patch_model(tiny_decoder("bert"), **SMALL)
        with pytest.raises(ValueError, match="the layer stack of a patched decoder got no mask"):
            model.encoder(torch.randn(1, 30, 32))

    def test_more_tokens_than_positions(self) -> None:
        settings = {**SMALL, "max_position_embeddings": 40}
        model = lsg_patch.patch_model(tiny_decoder("bert"), **settings)
        ids = ids_like(right_padded(40), "bert")
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
            with pytest.raises(ValueError, match="41 tokens, the patched model 40 positions"):
                model(ids[:, :1], past_key_values=cache)

    @pytest.mark.parametrize("family", [family for family in FAMILIES if family not in DECODERS])
    def test_encoders_that_are_told_to_be_decoders(self, family: str) -> None:
        model = tiny_decoder(family)
        before = fingerprint(model)
        with pytest.raises(ValueError, match=r"is_decoder=True, but .* is an encoder and no deco"):
            lsg_patch.patch_model(model, **SMALL)
        assert fingerprint(model) == before

    def test_a_bias_by_distance(self) -> None:
        """Of a family from outside; it would go unseen."""

        class BiasedModel(transformers.BertModel):
            pass

        def no_bias(stack: Any) -> Tensor:
            return torch.zeros(4, 1)

        bert = lsg_patch.families.FAMILIES["bert"]
        lsg_patch.register_family(
            dataclasses.replace(
                bert, name="biased", base_classes=("BiasedModel",), relative_bias=no_bias
            )
        )
        try:
            lsg_patch.patch_model(BiasedModel(models.tiny_config("bert")), **SMALL)
            model = BiasedModel(models.tiny_config("bert", is_decoder=True))
            with pytest.raises(ValueError, match="decoders of the family biased are not supported"):
                lsg_patch.patch_model(model, **SMALL)
        finally:
            del lsg_patch.families.FAMILIES["biased"]

    def test_the_mask_of_a_static_cache(self) -> None:
        model = lsg_patch.patch_model(tiny_decoder("bert"), **SMALL)
        with pytest.raises(ValueError, match="leave cache_implementation out"):
            model(torch.full((1, 5), 7), attention_mask=torch.ones(1, 1, 5, 9))
