"""Modules that PEFT or torchao changed before or after a patch: it works, or is refused with the mend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import lsg_patch
from tests.models import ids_like, right_padded, run, tiny_model
from tests.test_patching import assert_bitwise, fingerprint, values

SETTINGS: dict[str, Any] = {
    "block_size": 8,
    "sparse_block_size": 8,
    "max_position_embeddings": 200,
    "num_global_tokens": 2,
}
SHORT, LONG = right_padded(16, 11), right_padded(90, 55)


def outputs(model: nn.Module, mask: torch.Tensor) -> torch.Tensor:
    return run(model, ids_like(mask, "bert"), mask)["last_hidden_state"][mask.bool()]


def with_lora(model: Any, *targets: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(target_modules=list(targets), **settings)).eval()
    for name, parameter in model.named_parameters():
        if "lora" in name:  # one of the two is zero at first
            nn.init.normal_(parameter, std=0.1)
    return model


def quantized(model: nn.Module, kind: type[nn.Module]) -> nn.Module:
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda x, name: isinstance(x, kind))
    return model


@pytest.mark.parametrize("sparsity_type", ["norm", "lsh"])
@pytest.mark.parametrize("tool", ["query", "words", "int8"])
def test_what_works(tool: str, sparsity_type: str) -> None:
    """The first global token has what the adapter adds to its word: short inputs stay what they are."""
    model = tiny_model("bert")
    if tool == "int8":
        quantized(model, nn.Linear)
    else:
        tables = ["word_embeddings", "token_type_embeddings"]
        model = with_lora(model, *(["query", "value"] if tool == "query" else tables))
    short, before = outputs(model, SHORT), fingerprint(model)
    settings = {**SETTINGS, "num_global_tokens": 1, "sparsity_type": sparsity_type}
    lsg_patch.patch_model(model, **settings)
    torch.testing.assert_close(outputs(model, SHORT), short, rtol=0, atol=1e-5)
    assert outputs(model, LONG).isfinite().all()
    lsg_patch.unpatch_model(model)
    assert fingerprint(model) == before and torch.equal(outputs(model, SHORT), short)


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        ("lora", r"peft\.\S+Embedding and no torch.nn.Embedding.*merge_and_unload"),
        ("int8", "is a Int8Tensor of shape .*quantize them after"),
        ("stack", "PEFT keeps a second copy .*put the adapter on after"),
    ],
)
def test_what_is_refused(tool: str, message: str) -> None:
    model = tiny_model("bert")
    if tool == "lora":
        model = with_lora(model, "position_embeddings")
    elif tool == "int8":
        quantized(model, nn.Embedding)
    else:
        model = with_lora(model, "pooler.dense", modules_to_save=["encoder"])
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        lsg_patch.patch_model(model, **SETTINGS)
    assert fingerprint(model) == before


def test_an_adapter_on_the_table_while_patched() -> None:
    """It has as many rows as the long table: it is merged before the revert, as the message says."""
    plain = lsg_patch.patch_model(tiny_model("bert"), **SETTINGS)
    model = with_lora(plain, "position_embeddings")
    long = outputs(model, LONG)
    with pytest.raises(ValueError, match="an adapter was put on it.*merge_and_unload"):
        lsg_patch.unpatch_model(model)
    assert torch.equal(outputs(model, LONG), long)
    merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged, LONG), long)
    lsg_patch.unpatch_model(merged)
    assert merged.embeddings.position_embeddings.weight.shape == (64, 32)


@pytest.mark.parametrize("saved", ["global_embeddings", "embeddings"])
def test_copies_of_modules_are_reverted(saved: str) -> None:
    """PEFT's modules_to_save copies modules while they are patched."""
    stored = values(tiny_model("bert"))
    plain = lsg_patch.patch_model(tiny_model("bert"), **SETTINGS)
    model = get_peft_model(
        plain, LoraConfig(target_modules=["query"], modules_to_save=[saved])
    ).eval()
    lsg_patch.global_embeddings(model).data.add_(1)
    outputs(model, LONG)
    lsg_patch.unpatch_model(model)
    assert not lsg_patch.is_patched(model)
    for module in model.modules():
        assert not any("lsg" in name for name in vars(module))
        assert not any(
            hooks for key, hooks in vars(module).items() if "forward" in key and "hooks" in key
        )
        if isinstance(module, nn.Embedding):
            assert module.num_embeddings == len(module.weight) <= 120
    rows = model.base_model.model.embeddings(ids_like(right_padded(60), "bert"))
    assert rows.shape == (1, 60, 32)
    assert torch.equal(outputs(model, SHORT), outputs(tiny_model("bert"), SHORT))
    with model.disable_adapter():
        assert torch.equal(outputs(model, SHORT), outputs(tiny_model("bert"), SHORT))
    assert_bitwise({k: v for k, v in values(model.unload()).items() if k in stored}, stored)


def test_a_classifier_that_is_saved() -> None:
    model = tiny_model("bert", transformers.BertForSequenceClassification)
    config = LoraConfig(target_modules=["query"], modules_to_save=["classifier"])
    lsg_patch.unpatch_model(lsg_patch.patch_model(get_peft_model(model, config), **SETTINGS))
