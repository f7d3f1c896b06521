"""Users' classes that override a forward: they go on running, and the patch is in what they call."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor, nn

import lsg_patch
from tests.models import ids_like, right_padded, tiny_config, tiny_model
from tests.seq2seq import tiny_model as tiny_seq2seq

SETTINGS: dict[str, Any] = {"block_size": 8, "sparse_block_size": 8, "max_position_embeddings": 160}
LEFT = torch.cat([torch.zeros(1, 11), torch.ones(1, 79)], 1).long()
MASKS = {
    "short": right_padded(13, 5),
    "long": right_padded(90),
    "left": torch.cat([LEFT, torch.ones(1, 90).long()]),
    "packed": right_padded(90, 20, 9),
}


class TakesBatch(transformers.BertModel):
    def forward(self, batch: dict[str, Any]) -> Any:  # type: ignore[override]
        return super().forward(**batch)


class SameParameters(transformers.BertModel):
    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kw: Any) -> Any:  # type: ignore[override]
        return super().forward(input_ids, attention_mask, **kw)


class PassesThrough(transformers.BertModel):
    def forward(self, *args: Any, **kw: Any) -> Any:  # type: ignore[override]
        return super().forward(*args, **kw)


class Renames(transformers.BertModel):
    def forward(self, words: Tensor, real: Tensor | None = None, **kw: Any) -> Any:  # type: ignore[override]
        return super().forward(input_ids=words, attention_mask=real, **kw)


class OfAnother(PassesThrough):
    def forward(self, *, text: Tensor, seen: Tensor, **kw: Any) -> Any:  # type: ignore[override]
        return super().forward(text, seen, **kw)


CALLS: dict[type[Any], Any] = {
    TakesBatch: lambda m, i, x, **kw: m({"input_ids": i, "attention_mask": x, **kw}),
    SameParameters: lambda m, i, x, **kw: m(i, attention_mask=x, **kw),
    PassesThrough: lambda m, i, x, **kw: m(i, x, **kw),
    Renames: lambda m, i, x, **kw: m(i, real=x, **kw),
    OfAnother: lambda m, i, x, **kw: m(text=i, seen=x, **kw),
}


def pair(cls: type[Any], family: str = "bert", **config: Any) -> tuple[Any, Any]:
    """A model of the user's class, and the plain one with the same weights."""
    plain = tiny_model(family, **config)
    own = cls(copy.deepcopy(plain.config)).eval()
    own.load_state_dict(plain.state_dict())
    return own, plain


@pytest.mark.parametrize("cls", CALLS)
@pytest.mark.parametrize("mask", MASKS)
def test_an_encoder_gives_what_the_plain_one_gives(cls: type[Any], mask: str) -> None:
    own, plain = pair(cls)
    ids = ids_like(MASKS[mask], "bert")
    lsg_patch.patch_model(own, **SETTINGS)
    lsg_patch.patch_model(plain, **SETTINGS)
    with torch.no_grad():
        expected = plain(ids, MASKS[mask], output_hidden_states=True)
        found = CALLS[cls](own, ids, MASKS[mask], output_hidden_states=True)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    torch.testing.assert_close(found.hidden_states, expected.hidden_states)


@pytest.mark.parametrize("cls", CALLS)
def test_the_checks_of_an_input_hold(cls: type[Any]) -> None:
    own = lsg_patch.patch_model(pair(cls)[0], **SETTINGS)
    mask = right_padded(170)
    with pytest.raises(ValueError, match="170 tokens, the patched model 160"):
        CALLS[cls](own, ids_like(mask, "bert"), mask)


def test_no_mask_is_quadratic() -> None:
    own, _ = pair(SameParameters)
    lsg_patch.patch_model(own, **{**SETTINGS, "max_position_embeddings": 1200})
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            made = function(*args, **(kwargs or {}))
            sizes.extend(
                x.numel()
                for x in (made if isinstance(made, tuple) else (made,))
                if isinstance(x, Tensor)
            )
            return made

    with torch.no_grad(), Watch():
        own(torch.full((1, 1001), 7), torch.ones(1, 1001, dtype=torch.long))
    assert max(sizes) < 1000 * 1000 / 4


@pytest.mark.parametrize("cls", CALLS)
def test_it_stays_what_it_was(cls: type[Any]) -> None:
    own, _ = pair(cls)
    name, signature, attributes = str(type(own)), inspect.signature(own.forward), set(vars(own))
    ids, mask = ids_like(MASKS["short"], "bert"), MASKS["short"]
    with torch.no_grad():
        before = CALLS[cls](own, ids, mask).last_hidden_state
    lsg_patch.patch_model(own, **SETTINGS)
    assert isinstance(own, cls)
    assert str(type(own)) == name
    assert inspect.signature(own.forward) == signature
    copies = [copy.deepcopy(own), pickle.loads(pickle.dumps(own))]
    for model in (own, *copies):
        lsg_patch.unpatch_model(model)
        assert type(model) is cls
        assert set(vars(model)) == attributes
        with torch.no_grad():
            assert torch.equal(CALLS[cls](model, ids, mask).last_hidden_state, before)


def test_copies_run_with_their_own_weights() -> None:
    own = lsg_patch.patch_model(pair(Renames)[0], **SETTINGS)
    other = copy.deepcopy(own)
    ids = ids_like(MASKS["long"], "bert")
    with torch.no_grad():
        expected = own(ids).last_hidden_state
        for parameter in own.parameters():
            parameter.zero_()
        assert torch.equal(other(ids).last_hidden_state, expected)


class Locked(transformers.BertModel):
    """What it has cannot be copied, so it says what can."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lock"}


def test_copies_are_made_as_their_class_says() -> None:
    own = pair(Locked)[0]
    lsg_patch.patch_model(own, **SETTINGS)
    ids = ids_like(MASKS["long"], "bert")
    for again in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert not hasattr(again, "lock")
        with torch.no_grad():
            assert torch.equal(again(ids).last_hidden_state, own(ids).last_hidden_state)


class Registered(transformers.BertModel):
    known: ClassVar[dict[str, type[Any]]] = {}

    def __init_subclass__(cls, *, kind: str, **more: Any) -> None:
        super().__init_subclass__(**more)
        Registered.known[kind] = cls


class Mine(Registered, kind="mine"):
    pass


class MineOverridden(Registered, kind="overridden"):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("cls", [Mine, MineOverridden])
def test_what_is_made_of_a_class_is_no_class_of_the_users(cls: type[Any]) -> None:
    own, plain = pair(cls)
    ids = ids_like(MASKS["long"], "bert")
    for model in (own, plain):
        lsg_patch.patch_model(model, **SETTINGS)
    with torch.no_grad():
        assert torch.equal(own(ids).last_hidden_state, plain(ids).last_hidden_state)
    assert Registered.known == {"mine": Mine, "overridden": MineOverridden}


def test_a_head_around_it() -> None:
    plain = tiny_model("bert", transformers.BertForSequenceClassification)
    own = copy.deepcopy(plain)
    own.bert = pair(PassesThrough)[0]
    own.bert.load_state_dict(plain.bert.state_dict(), strict=False)
    own.bert.pooler = plain.bert.pooler
    ids = ids_like(MASKS["left"], "bert")
    for model in (own, plain):
        lsg_patch.patch_model(model, **SETTINGS)
    with torch.no_grad():
        expected, found = (model(ids, MASKS["left"]).logits for model in (plain, own))
    torch.testing.assert_close(found, expected)


class Esm(transformers.EsmModel):
    def forward(self, words: Any = None, *, states: Any = None, **kw: Any) -> Any:  # type: ignore[override]
        return super().forward(words, inputs_embeds=states, **kw)


def test_esm_given_inputs_embeds() -> None:
    own, plain = pair(Esm, "esm")
    for model in (own, plain):
        lsg_patch.patch_model(model, **SETTINGS)
    with torch.no_grad():
        embedded = plain.get_input_embeddings()(ids_like(MASKS["long"], "esm"))
        expected = plain(inputs_embeds=embedded).last_hidden_state
        found = own(states=embedded).last_hidden_state
    assert found.shape == (1, 90, 32)
    torch.testing.assert_close(found, expected)


class Distil(transformers.DistilBertModel):
    def forward(self, batch: dict[str, Any]) -> Any:  # type: ignore[override]
        return super().forward(**batch)


def test_distilbert() -> None:
    own, plain = pair(Distil, "distilbert")
    ids = ids_like(MASKS["packed"], "distilbert")
    for model in (own, plain):
        lsg_patch.patch_model(model, **SETTINGS)
    with torch.no_grad():
        given = {"input_ids": ids, "attention_mask": MASKS["packed"]}
        torch.testing.assert_close(own(given).last_hidden_state, plain(**given).last_hidden_state)


class Decoder(transformers.BertLMHeadModel):
    """A head, whose base is a user's class too."""


class DecoderBase(transformers.BertModel):
    def forward(self, input_ids: Any = None, **kw: Any) -> Any:  # type: ignore[override]
        return super().forward(input_ids, **kw)


def test_a_decoder() -> None:
    plain = tiny_model("bert", transformers.BertLMHeadModel, is_decoder=True)
    own = copy.deepcopy(plain)
    own.bert = DecoderBase(own.config, add_pooling_layer=False).eval()
    own.bert.load_state_dict(plain.bert.state_dict(), strict=False)
    ids = ids_like(MASKS["long"], "bert")
    for model in (own, plain):
        lsg_patch.patch_model(model, **SETTINGS)
    with torch.no_grad():
        torch.testing.assert_close(own(ids).logits, plain(ids).logits)
        first, second = (model(ids[:, :60], use_cache=True) for model in (own, plain))
        step = {"input_ids": ids[:, 60:61], "attention_mask": torch.ones(1, 61).long()}
        found = own(**step, past_key_values=first.past_key_values).logits
        expected = plain(**step, past_key_values=second.past_key_values).logits
    torch.testing.assert_close(found, expected)


def test_a_users_self_attention_runs_around_ours() -> None:
    model = tiny_model("bert")
    cls = type(model.encoder.layer[0].attention.self)

    class Doubled(cls):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kw: Any) -> Any:
            output, *rest = super().forward(*args, **kw)
            return (2 * output, *rest)

    class Same(cls):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kw: Any) -> Any:
            return super().forward(*args, **kw)

    ids = ids_like(MASKS["long"], "bert")
    lsg_patch.patch_model(model, **SETTINGS)
    found = [model(ids).last_hidden_state]
    for own in (Same, Doubled):
        lsg_patch.unpatch_model(model)
        model.encoder.layer[0].attention.self.__class__ = own
        lsg_patch.patch_model(model, **SETTINGS)
        found.append(model(ids).last_hidden_state)
    torch.testing.assert_close(found[1], found[0])
    assert (found[2] - found[0]).abs().max() > 0.1
    assert type(lsg_patch.unpatch_model(model).encoder.layer[0].attention.self) is Doubled


def test_an_encoder_of_an_encoder_decoder() -> None:
    plain = tiny_seq2seq("bart")
    own = copy.deepcopy(plain)

    class Encoder(type(plain.encoder)):  # type: ignore[misc]
        def forward(self, *args: Any, **kw: Any) -> Any:
            return super().forward(*args, **kw)

    own.encoder.__class__ = Encoder
    ids = ids_like(MASKS["packed"], "bert")
    given = {"input_ids": ids, "attention_mask": MASKS["packed"], "decoder_input_ids": ids[:, :7]}
    for model in (own, plain):
        lsg_patch.patch_model(model, **SETTINGS)
    with torch.no_grad():
        torch.testing.assert_close(own(**given)[0], plain(**given)[0])


class BertModel(nn.Module):
    """Of the name of a known class, and nothing of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.config = tiny_config("bert")
        own = tiny_model("bert")
        self.embeddings, self.encoder = own.embeddings, own.encoder

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.encoder(self.embeddings(tokens))[0]


def test_a_forward_in_which_nothing_is_found_is_refused() -> None:
    model = BertModel()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"BertModel has no parameter input_ids.*super\(\)"):
        lsg_patch.patch_model(model, **SETTINGS)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not lsg_patch.is_patched(model)


class TestTwoHeadsOnOneEncoder:
    @staticmethod
    def heads() -> tuple[Any, Any]:
        first = tiny_model("bert", transformers.BertForSequenceClassification)
        other = tiny_model("bert", transformers.BertForMaskedLM)
        other.bert = first.bert
        assert other.config is not first.config
        return first, other

    def test_both_configs_state_the_length(self) -> None:
        first, other = self.heads()
        states = [copy.deepcopy(vars(head.config)) for head in (first, other)]
        lsg_patch.patch_model(first, **SETTINGS)
        for head in (first, other):
            assert head.config.max_position_embeddings == 160
            assert head.config.lsg_patch == first.config.lsg_patch
        lsg_patch.unpatch_model(other)
        assert [vars(head.config) for head in (first, other)] == states

    def test_one_that_states_another_length_is_refused(self) -> None:
        first, other = self.heads()
        other.config.max_position_embeddings = 77
        with pytest.raises(ValueError, match=r"BertForMaskedLM .*max_position_embeddings is 77"):
            lsg_patch.patch_model(first, **SETTINGS)
        assert not lsg_patch.is_patched(first)

    def test_a_copy_of_one_head_has_no_part_in_the_other(self) -> None:
        first, other = self.heads()
        lsg_patch.patch_model(first, **SETTINGS)
        lsg_patch.unpatch_model(copy.deepcopy(first))
        assert other.config.max_position_embeddings == first.config.max_position_embeddings == 160
