"""Families from outside, models that are refused, and models that nobody knows."""

from __future__ import annotations

import dataclasses
import doctest
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lsg_patch
from lsg_patch import Family
from lsg_patch.families import FAMILIES, REFUSED, registry
from tests.models import ids_like, right_padded, run, tiny_model


@pytest.fixture(autouse=True)
def _families_as_they_were() -> Iterator[None]:
    before = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


def test_the_example() -> None:
    (example,) = (
        test
        for test in doctest.DocTestFinder().find(registry)
        if test.name.endswith("register_family")
    )
    runner = doctest.DocTestRunner()
    runner.run(example)
    assert runner.tries > 10 and not runner.failures
    assert "my-encoder" in FAMILIES


def test_a_class_that_is_not_derived_from_a_known_one() -> None:
    class Reader(nn.Module):
        """A BERT under another name: only its family is missing."""

        def __init__(self) -> None:
            super().__init__()
            bert = tiny_model("bert")
            self.config, self.embeddings, self.encoder = bert.config, bert.embeddings, bert.encoder

        def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
            hidden = self.embeddings(input_ids)
            if attention_mask is not None:
                attention_mask = (1.0 - attention_mask[:, None, None, :]) * -1e9
            return self.encoder(hidden, attention_mask=attention_mask)

    model, mask = Reader().eval(), right_padded(30, 14)
    ids = ids_like(mask, "bert")
    expected = run(model, ids, mask)["last_hidden_state"]
    with pytest.raises(TypeError, match=r"Reader holds no model .*lsg_patch.register_family"):
        lsg_patch.patch_model(model)
    lsg_patch.register_family(Family("reader", ("Reader",)))
    with lsg_patch.patched(model, block_size=16):
        actual = run(model, ids, mask)["last_hidden_state"]
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)


def test_the_same_again_is_no_error() -> None:
    family = Family("mine", ("MyModel",))
    assert lsg_patch.register_family(family) is family
    assert lsg_patch.register_family(dataclasses.replace(family)) == family
    assert lsg_patch.register_family(FAMILIES["albert"]) is FAMILIES["albert"]


@pytest.mark.parametrize(
    ("family", "error", "message"),
    [
        (Family("bert", ("OtherModel",)), ValueError, "name 'bert' already"),
        (
            Family("other", ("OtherModel", "BertModel")),
            ValueError,
            "BertModel is a class of .*bert",
        ),
        (Family("", ("OtherModel",)), ValueError, "Family.name is empty"),
        (Family("other", ()), ValueError, "base_classes is empty"),
        (Family("other", "OtherModel"), TypeError, "base_classes must be a tuple"),  # type: ignore[arg-type]
        (Family("other", ("OtherModel",), stack=None), TypeError, "stack must be a string"),  # type: ignore[arg-type]
        (Family("other", ("OtherModel",), output="dense"), TypeError, "output must be a function"),  # type: ignore[arg-type]
        (
            Family("other", ("OtherModel",), relative_bias="table"),  # type: ignore[arg-type]
            TypeError,
            "relative_bias must be a function",
        ),
        (
            Family("other", ("OtherModel",), relative_bias=len, stack="embeddings"),  # type: ignore[arg-type]
            ValueError,
            "relative_bias needs embeddings outside of the stack",
        ),
        (Family("other", ("OtherModel",), names="query"), TypeError, "names must be Attention"),  # type: ignore[arg-type]
        ("other", TypeError, "Family is registered, not str"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_families_that_are_refused(family: Any, error: type[Exception], message: str) -> None:
    before = dict(FAMILIES)
    with pytest.raises(error, match=message):
        lsg_patch.register_family(family)
    assert before == FAMILIES


def test_a_family_that_does_not_fit_its_models() -> None:
    class Other(transformers.BertModel):  # type: ignore[misc]
        pass

    lsg_patch.register_family(Family("other", ("Other",), words="no_such_table"))
    with pytest.raises(TypeError, match="Other is not built like a other model: .*no_such_table"):
        lsg_patch.patch_model(tiny_model("bert", Other))


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_patched(name: str) -> None:
    """An empty base model, alone and inside another module."""
    stem = name.removesuffix("PreTrainedModel")
    cls = getattr(transformers, f"{stem}Model", None)
    if cls is None:
        pytest.skip(f"this transformers has no {stem}")
    model = cls.__new__(cls)
    nn.Module.__init__(model)
    assert name in [c.__name__ for c in cls.__mro__]
    for given in (model, nn.ModuleDict({"encoder": model})):
        with pytest.raises(TypeError) as caught:
            lsg_patch.patch_model(given)
        for part in REFUSED[name]:
            assert part in str(caught.value)


def test_a_registered_family_comes_before_a_refusal() -> None:
    class BigBirdPreTrainedModel(transformers.BertModel):  # type: ignore[misc]
        pass

    model = tiny_model("bert", BigBirdPreTrainedModel)
    assert lsg_patch.is_patched(lsg_patch.patch_model(model))


class Embeddings(nn.Module):
    """With positions behind two rows of another use, counted in a buffer."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.word_embeddings, self.position_embeddings = nn.Embedding(120, 32), nn.Embedding(66, 32)
        self.LayerNorm, self.dropout = nn.LayerNorm(32), nn.Dropout(0.0)
        counted = torch.arange(2, 66)
        self.register_buffer("position_ids", counted if dims == 1 else counted[None])

    def forward(self, ids: Any) -> Any:
        places = self.position_embeddings(self.position_ids[..., : ids.shape[1]])
        return self.LayerNorm(self.word_embeddings(ids) + places)


class Lone(nn.Module):
    """What it gives is a tensor; its mask is by keyword alone."""

    def __init__(self, dims: int, with_config: bool = True) -> None:
        super().__init__()
        bert = tiny_model("bert")
        self.embeddings, self.encoder = Embeddings(dims), bert.encoder
        if with_config:
            self.config = bert.config

    def forward(self, input_ids: Any, *, attention_mask: Any = None) -> Any:
        mask = None if attention_mask is None else attention_mask[:, None, None] == 1
        return self.encoder(self.embeddings(input_ids), attention_mask=mask)[0]


LONE = Family(
    "lone",
    ("Lone",),
    token_types=None,
    position_offset=lambda table: 2,
    config_counts_offset=False,
)


@pytest.mark.parametrize("dims", [1, 2])
def test_a_model_of_tensors_alone(dims: int) -> None:
    lsg_patch.register_family(LONE)
    torch.manual_seed(0)
    model, mask = Lone(dims).eval(), right_padded(30, 14)
    ids, buffer = ids_like(mask, "bert"), model.embeddings.position_ids.clone()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask)
        with lsg_patch.patched(model, block_size=16, max_position_embeddings=200):
            actual = model(ids, attention_mask=mask)
            assert model(ids.repeat(1, 5)).shape == (2, 150, 32)
            assert model.embeddings.position_ids.flatten()[:3].tolist() == [2, 3, 4]
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)
    assert torch.equal(model.embeddings.position_ids, buffer)


def test_a_model_without_a_config_is_refused() -> None:
    lsg_patch.register_family(LONE)
    with pytest.raises(TypeError, match="Lone has no config: give it one"):
        lsg_patch.patch_model(Lone(2, with_config=False))
