"""transformers' Trainer with a patched model: each of its options against the plain run or a direct computation."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from torch import nn

import lsg_patch
from tests.models import ids_like, right_padded, tiny_model
from tests.tokenizers import real_tokenizer

SETTINGS: dict[str, Any] = {"block_size": 8, "sparse_block_size": 8, "max_position_embeddings": 200}
# no two are as long
ROWS = [
    {"input_ids": ids_like(right_padded(length), "bert", seed=length)[0], "labels": length % 2}
    for length in range(70, 86)
]
NAMES = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
GROUPED: dict[str, Any] = (
    {"group_by_length": True}
    if "group_by_length" in NAMES
    else {"train_sampling_strategy": "group_by_length"}
)
EVERYTHING = {
    "gradient_checkpointing": True,
    "bf16": True,
    "label_smoothing_factor": 0.2,
    "gradient_accumulation_steps": 2,
    **GROUPED,
}


@pytest.fixture(autouse=True)
def _each_has_its_own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was chosen stays in the process, and in 4.x in its environment."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(True)


def trainer(folder: Path, **options: Any) -> transformers.Trainer:
    """Of a new patched classifier, the same each time, for four steps of four texts."""
    model = tiny_model("bert", transformers.BertForSequenceClassification)
    lsg_patch.patch_model(model, num_global_tokens=2, **SETTINGS)
    arguments: dict[str, Any] = {
        "max_steps": 4,
        "logging_steps": 1,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(str(folder / "run"), **arguments),
        train_dataset=ROWS,
        data_collator=transformers.DataCollatorWithPadding(real_tokenizer(folder)),
    )


def losses(trained: transformers.Trainer) -> torch.Tensor:
    return torch.tensor([entry["loss"] for entry in trained.state.log_history if "loss" in entry])


def run(folder: Path, **options: Any) -> torch.Tensor:
    made = trainer(folder, **options)
    before = lsg_patch.global_embeddings(made.model).detach().clone()
    made.train()
    assert (lsg_patch.global_embeddings(made.model) - before).abs().max() > 1e-4
    assert all(p.dtype == torch.float32 for p in made.model.parameters())
    return losses(made)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"gradient_checkpointing": True}, 1e-4),
        ({"bf16": True}, 0.1),
    ],
    ids=["checkpointing", "bf16"],
)
def test_losses_are_those_of_the_plain_run(
    options: dict[str, Any], tolerance: float, tmp_path: Path
) -> None:
    plain = run(tmp_path)
    assert len(plain) == 4
    torch.testing.assert_close(run(tmp_path, **options), plain, rtol=0, atol=tolerance)


def test_grouped_by_length(tmp_path: Path) -> None:
    """The longest first: each step's loss is that of its four texts, read one by one."""
    made, seen = trainer(tmp_path, learning_rate=0.0, **GROUPED), []
    model: Any = made.model
    alone = copy.deepcopy(model).eval()
    handle = model.register_forward_pre_hook(
        lambda _, args, given: seen.append(given), with_kwargs=True
    )
    made.train()
    handle.remove()
    lengths = [each["attention_mask"].sum(1).tolist() for each in seen]
    assert all(each == sorted(each, reverse=True) for each in lengths) and lengths[0][0] == 85
    for each, loss in zip(seen, losses(made), strict=True):
        of_rows = [
            alone(ids[mask.bool()][None], labels=label[None]).loss
            for ids, mask, label in zip(
                each["input_ids"], each["attention_mask"], each["labels"], strict=True
            )
        ]
        torch.testing.assert_close(loss, sum(of_rows) / 4, rtol=0, atol=1e-4)


def test_label_smoothing(tmp_path: Path) -> None:
    made = trainer(tmp_path, label_smoothing_factor=0.2, learning_rate=0.0)
    model: Any = copy.deepcopy(made.model)
    made.train()
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.2)
    with torch.no_grad():
        of_rows = [
            smoothed(model.eval()(row["input_ids"][None]).logits, torch.tensor([row["labels"]]))
            for row in ROWS
        ]
    torch.testing.assert_close(losses(made).mean(), sum(of_rows) / len(ROWS), rtol=0, atol=1e-4)


def test_resumed_with_everything_at_once(tmp_path: Path) -> None:
    whole = trainer(tmp_path, **EVERYTHING)
    whole.train()
    resumed = trainer(tmp_path, **EVERYTHING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(losses(resumed), losses(whole)) and len(losses(whole)) == 4
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
