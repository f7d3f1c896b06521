"""Weights that are loaded into a patched model: no trained global token is left out silently."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

import lsg_patch
from tests.models import tiny_model
from tests.test_patching import SETTINGS, assert_bitwise, values


@pytest.mark.parametrize("head", ["BertModel", "BertForSequenceClassification"])
@pytest.mark.parametrize("copied", [False, True])
def test_a_state_dict_without_them(head: str, copied: bool) -> None:
    cls = getattr(transformers, head)
    model = lsg_patch.patch_model(tiny_model("bert", cls), **SETTINGS)
    model = copy.deepcopy(model) if copied else model
    other = lsg_patch.patch_model(tiny_model("bert", cls, seed=1), **SETTINGS)
    own, without = values(model), other.state_dict()
    name = next(key for key in without if "global_embeddings" in key)
    del without[name]
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=f"nothing was loaded: .* has no {name}"):
            model.load_state_dict(without, strict=strict)
        assert_bitwise(values(model), own)
    model.load_state_dict({**model.state_dict(), **without})  # what the message says
    assert torch.equal(lsg_patch.global_embeddings(model), own[name])
    assert_bitwise(values(model), {**values(other), name: own[name]})
    model.load_state_dict(other.state_dict())
    assert_bitwise(values(model), values(other))
    lsg_patch.unpatch_model(model).load_state_dict(lsg_patch.unpatch_model(other).state_dict())


def test_inside_another_module() -> None:
    model = lsg_patch.patch_model(nn.ModuleDict({"encoder": tiny_model("bert")}), **SETTINGS)
    own = values(model)
    with pytest.raises(RuntimeError, match="nothing was loaded"):
        model.load_state_dict(nn.ModuleDict({"encoder": tiny_model("bert")}).state_dict())
    assert_bitwise(values(model), own)
    model.load_state_dict(own)


def test_without_global_tokens_there_is_nothing_to_miss() -> None:
    model = lsg_patch.patch_model(tiny_model("bert"), num_global_tokens=0, **SETTINGS)
    model.load_state_dict(values(model))


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_table_of_another_length(family: str) -> None:
    model = lsg_patch.patch_model(tiny_model(family), **SETTINGS)
    settings = {**SETTINGS, "max_position_embeddings": 300}
    other = lsg_patch.patch_model(tiny_model(family, seed=1), **settings)
    own = values(model)
    with pytest.raises(RuntimeError, match=r"nothing was loaded: .* has 30\d rows .* and 20\d in"):
        model.load_state_dict(other.state_dict(), strict=False)
    assert_bitwise(values(model), own)


def test_a_part_may_lack_them() -> None:
    """Shards of a checkpoint and adapters are loaded so."""
    model = lsg_patch.patch_model(tiny_model("bert"), **SETTINGS)
    part = dict(list(tiny_model("bert", seed=1).state_dict().items())[-8:])
    assert not any("position" in name for name in part)
    model.load_state_dict(part, strict=False)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in part.items())


def test_rows_that_have_no_place_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """Published checkpoints have 512 rows, whatever they use."""
    model = lsg_patch.patch_model(tiny_model("bert"), **SETTINGS)
    state = values(model)
    caplog.clear()
    model.load_state_dict(state)
    assert not caplog.messages
    state["embeddings.global_embeddings.weight"] = torch.randn(3, 32)
    model.load_state_dict(state)
    (message,) = caplog.messages
    assert "first 1 of 3" in message
