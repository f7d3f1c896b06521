"""PEFT: adapters are trained, saved, switched, merged and taken away; what it cannot do is said."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)

import lsg_patch
from tests.models import ids_like, right_padded, tiny_model
from tests.seq2seq import ids_like as tiny_ids
from tests.seq2seq import tiny_model as tiny_seq2seq
from tests.test_patching import fingerprint

SETTINGS: dict[str, Any] = {"block_size": 8, "sparse_block_size": 8, "max_position_embeddings": 100}
IDS = ids_like(right_padded(60, 41), "bert")


SHORT = ids_like(right_padded(16), "bert")
# as it is made, the adapter of neither does anything
ADAPTERS = {
    "lora": LoraConfig(target_modules=["query", "value"]),
    "ia3": IA3Config(
        target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]
    ),
}
adapters = pytest.mark.parametrize("kind", ADAPTERS)


def classifier() -> Any:
    return tiny_model("bert", transformers.BertForSequenceClassification)


def patched_classifier(**settings: Any) -> Any:
    return lsg_patch.patch_model(classifier(), **{**SETTINGS, **settings})


def train(model: Any) -> None:
    """Learns the labels of IDS with what may be trained, which is the active adapter."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(parameters, lr=3e-2), []
    for _ in range(5):
        losses.append(model(IDS, labels=torch.tensor([0, 1])).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


@adapters
def test_an_adapter_is_trained_saved_merged_and_taken_away(kind: str, tmp_path: Path) -> None:
    base = patched_classifier()(IDS).logits
    model = get_peft_model(patched_classifier(), ADAPTERS[kind]).eval()
    assert torch.equal(model(IDS).logits, base)
    train(model)
    long, short = model(IDS).logits, model(SHORT).logits
    assert (long - base).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(patched_classifier(), tmp_path).eval()
    assert torch.equal(loaded(IDS).logits, long)
    # what was learned with long texts goes with the unpatched model as well
    merged = PeftModel.from_pretrained(classifier(), tmp_path).eval().merge_and_unload()
    torch.testing.assert_close(merged(SHORT).logits, short, rtol=0, atol=1e-5)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, long, rtol=0, atol=1e-5)
    lsg_patch.unpatch_model(merged)
    torch.testing.assert_close(merged(SHORT).logits, short, rtol=0, atol=1e-5)
    bare = model.unload()
    assert torch.equal(bare(IDS).logits, base)
    assert torch.equal(lsg_patch.unpatch_model(bare)(SHORT).logits, classifier()(SHORT).logits)


def test_two_adapters_are_switched() -> None:
    """LoRA and IA3 do not go together in PEFT: two of LoRA, also with the global tokens of each."""
    config = LoraConfig(target_modules=["query"], modules_to_save=["global_embeddings"])
    model = get_peft_model(patched_classifier(), config, adapter_name="first").eval()
    base = model(IDS).logits
    model.add_adapter("second", config)
    found = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        assert torch.equal(model(IDS).logits, base)
        found[name] = lsg_patch.global_embeddings(model)
        with torch.no_grad():
            found[name].mul_(2 if name == "first" else -1)
        train(model)
    assert found["first"] is not found["second"]
    outputs = {}
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        assert lsg_patch.global_embeddings(model) is found[name]
        assert torch.equal(outputs.setdefault(name, model(IDS).logits), model(IDS).logits)
    assert (outputs["first"] - outputs["second"]).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, base)
    lsg_patch.unpatch_model(model)
    with model.disable_adapter():
        assert torch.equal(model(SHORT).logits, classifier()(SHORT).logits)


@pytest.mark.parametrize("mask", [None, right_padded(60, 41)], ids=["no mask", "mask"])
def test_prefix_tuning_is_refused_by_name(mask: Any) -> None:
    """It was without effect, silently: an encoder's layers dropped the keys that it adds."""
    config = PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5)
    model = get_peft_model(patched_classifier(), config)
    with pytest.raises(ValueError, match="prefix tuning is not supported"):
        model(IDS, attention_mask=mask)


def test_the_first_virtual_token_of_a_prompt() -> None:
    """By default it is hidden, which a warning says; with its mend every one learns."""
    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5)

    def gradients(**settings: Any) -> torch.Tensor:
        torch.manual_seed(0)
        model = get_peft_model(patched_classifier(**settings), config)
        model(IDS, attention_mask=right_padded(60, 41)).logits.sum().backward()
        [prompt] = [p for name, p in model.named_parameters() if "prompt" in name]
        assert prompt.grad is not None
        return prompt.grad.abs().amax(-1)

    with pytest.warns(UserWarning, match="mask_first_token=False"):
        assert gradients()[0] == 0
    assert (gradients(mask_first_token=False) > 0).all()


@pytest.mark.parametrize("saved", ["global_embeddings", "embeddings"])
def test_global_tokens_that_peft_keeps_a_copy_of(saved: str) -> None:
    """The copy is in use: it is what is given, trained and frozen; the original is dead."""
    plain = patched_classifier()
    expected = plain(IDS).logits
    config = LoraConfig(target_modules=["query"], modules_to_save=[saved, "classifier"])
    model = get_peft_model(plain, config)
    torch.testing.assert_close(model(IDS).logits, expected)
    rows = lsg_patch.global_embeddings(model)
    [name] = [name for name, p in model.named_parameters() if p is rows]
    assert "modules_to_save" in name
    if saved == "global_embeddings":  # PEFT freezes what is in a module that it keeps a copy of
        model(IDS).logits.sum().backward()
        assert rows.grad is not None and rows.grad.abs().max() > 0
    lsg_patch.freeze_except_global(model, train_head=False)
    assert [p for p in model.parameters() if p.requires_grad] == [rows]
    with torch.no_grad():
        rows.mul_(torch.linspace(-2, 2, 32))
    assert (model(IDS).logits - expected).abs().max() > 1e-3


def test_an_adapter_of_global_tokens_that_was_loaded_before_the_patch(tmp_path: Path) -> None:
    """PEFT drops their rows where the model has none, without a word."""
    settings = LoraConfig(target_modules=["query"], modules_to_save=["global_embeddings"])
    model = get_peft_model(lsg_patch.patch_model(tiny_model("bert"), **SETTINGS), settings)
    with torch.no_grad():
        lsg_patch.global_embeddings(model).fill_(3.0)
    model.save_pretrained(tmp_path)
    early = PeftModel.from_pretrained(tiny_model("bert"), tmp_path)
    before = fingerprint(early)
    with pytest.raises(ValueError, match=r"adapter 'default' .* patch the model first"):
        lsg_patch.patch_model(early, **SETTINGS)
    assert fingerprint(early) == before
    patched = lsg_patch.patch_model(tiny_model("bert"), **SETTINGS)
    late = PeftModel.from_pretrained(patched, tmp_path)
    assert (lsg_patch.global_embeddings(late) == 3.0).all()


def test_an_adapter_of_another_number_of_global_tokens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = LoraConfig(target_modules=["query"], modules_to_save=["global_embeddings"])
    get_peft_model(patched_classifier(num_global_tokens=2), config).save_pretrained(tmp_path)
    PeftModel.from_pretrained(patched_classifier(), tmp_path)
    assert "only the first 1 of 2 global tokens are loaded" in caplog.text
    with pytest.raises(RuntimeError, match=r"global_embeddings.*\[2, 32\].*\[4, 32\]"):
        PeftModel.from_pretrained(patched_classifier(num_global_tokens=4), tmp_path)


def test_positions_that_peft_keeps_a_copy_of() -> None:
    """Of BART's encoder, where the patch adds them itself; the model reverts after the adapter is gone."""
    ids, short = tiny_ids(right_padded(60, 41)), tiny_ids(right_padded(16))
    plain = tiny_seq2seq("bart", "ForConditionalGeneration")(short).logits
    model = lsg_patch.patch_model(tiny_seq2seq("bart", "ForConditionalGeneration"), **SETTINGS)
    expected = model(ids).logits
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_positions"])
    adapted = get_peft_model(model, config).eval()
    logits = adapted(ids).logits
    assert torch.equal(logits, expected)
    logits.square().sum().backward()
    name = "encoder.embed_positions.modules_to_save"
    [table] = [p for x, p in adapted.named_parameters() if name in x]
    assert table.grad is not None and table.grad.abs().sum() > 0
    assert torch.equal(lsg_patch.unpatch_model(adapted.merge_and_unload())(short).logits, plain)
