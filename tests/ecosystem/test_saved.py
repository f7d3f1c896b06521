"""What others load comes back patched under auto patching: pipelines, SentenceTransformer, PEFT, Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import MultipleNegativesRankingLoss
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import lsg_patch
from tests.models import CLS, MASK, POSITIONS, VOCABULARY, ids_like, right_padded, tiny_model

LENGTH = 200
SETTINGS: dict[str, Any] = {
    "block_size": 8,
    "sparse_block_size": 8,
    "num_global_tokens": 2,
    "max_position_embeddings": LENGTH,
}
IDS = ids_like(right_padded(90, 55), "bert")
TEXT = " ".join(f"w{i % 100}" for i in range(150))


def words_tokenizer() -> Any:
    """Of words w0, w1, ...: cls in front, sep behind."""
    names = ["[PAD]", "[UNK]", "[SEP]", "[CLS]", "[MASK]"]
    names += [f"w{i}" for i in range(VOCABULARY - len(names))]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", CLS), ("[SEP]", 2)],
    )
    assert names[MASK] == "[MASK]"
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=POSITIONS,
        pad_token="[PAD]",
        unk_token="[UNK]",
        sep_token="[SEP]",
        cls_token="[CLS]",
        mask_token="[MASK]",
    )


def trained(model: Any) -> Any:
    """With global tokens that no rule gives."""
    with torch.no_grad():
        lsg_patch.global_embeddings(model).add_(torch.linspace(-1, 1, 32))
    return model


def logits_of(model: Any) -> torch.Tensor:
    """Without gradients, so that all of them are computed in one way."""
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A patched classifier, with its tokenizer."""
    tokenizer = words_tokenizer()
    model = tiny_model("bert", transformers.BertForSequenceClassification)
    lsg_patch.patch_model(model, **SETTINGS, tokenizer=tokenizer)
    trained(model).save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    own = vars(transformers.PreTrainedModel)["from_pretrained"]
    yield
    assert vars(transformers.PreTrainedModel)["from_pretrained"] is own


def test_pipeline(saved: Path) -> None:
    model = lsg_patch.from_pretrained(saved)
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    assert tokenizer.model_max_length == LENGTH
    with torch.no_grad():
        logits = model(**tokenizer(TEXT, return_tensors="pt")).logits
    with lsg_patch.auto_patching():
        classify = transformers.pipeline("text-classification", model=str(saved))
    assert lsg_patch.is_patched(classify.model)
    [found] = classify(TEXT)
    torch.testing.assert_close(found["score"], logits.softmax(-1).max().item())


def test_sentence_transformer(saved: Path, tmp_path: Path) -> None:
    model = SentenceTransformer(str(saved), device="cpu")
    assert not lsg_patch.is_patched(model)
    with lsg_patch.auto_patching():
        model = SentenceTransformer(str(saved), device="cpu")
    assert lsg_patch.is_patched(model) and model.max_seq_length == LENGTH
    expected = model.encode([TEXT, TEXT[:99]])
    model.save_pretrained(str(tmp_path / "again"))
    with lsg_patch.auto_patching():
        again = SentenceTransformer(str(tmp_path / "again"), device="cpu")
    assert lsg_patch.is_patched(again)
    assert again.max_seq_length == again.tokenizer.model_max_length == LENGTH
    assert (again.encode([TEXT, TEXT[:99]]) == expected).all()


def test_cross_encoder(saved: Path, tmp_path: Path) -> None:
    with lsg_patch.auto_patching():
        model = CrossEncoder(str(saved), device="cpu")
        expected = model.predict([(TEXT, TEXT[:50])])
        model.save_pretrained(str(tmp_path / "again"))
        again = CrossEncoder(str(tmp_path / "again"), device="cpu")
    assert lsg_patch.is_patched(again.model)
    assert (again.predict([(TEXT, TEXT[:50])]) == expected).all()


def test_an_adapter_whose_base_was_saved_patched(saved: Path, tmp_path: Path) -> None:
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    model = get_peft_model(lsg_patch.from_pretrained(saved), lora).eval()
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "adapter")
    with lsg_patch.auto_patching():
        again = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
        base = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits_of(again), expected)
    assert lsg_patch.is_patched(base)
    onto = PeftModel.from_pretrained(lsg_patch.from_pretrained(saved), tmp_path / "adapter")
    assert torch.equal(logits_of(onto), expected)


def trainer(model: Any, folder: Path, **more: Any) -> transformers.Trainer:
    mask = right_padded(*range(60, 76))
    rows = {"input_ids": ids_like(mask, "bert"), "attention_mask": mask, "labels": mask[:, 70]}
    rows = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
        **more,
    )
    return transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize("auto", [False, True])
def test_trainer_resumes(saved: Path, tmp_path: Path, auto: bool) -> None:
    """With the losses that an uninterrupted run has, and what it saves on the way comes back patched."""
    whole = trainer(lsg_patch.from_pretrained(saved), tmp_path / "run")
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    checkpoint = tmp_path / "run" / "checkpoint-2"
    model = lsg_patch.from_pretrained(saved)
    if auto:
        lsg_patch.enable_auto_patching()
        model = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoint)
    try:
        resumed = trainer(model, tmp_path / "run")
        resumed.train(resume_from_checkpoint=str(checkpoint))
    finally:
        lsg_patch.disable_auto_patching()
    assert [e["loss"] for e in resumed.state.log_history if "loss" in e] == losses
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert lsg_patch.is_patched(resumed.model)


@pytest.mark.parametrize("auto", [False, True])
def test_trainer_loads_the_best_model(saved: Path, tmp_path: Path, auto: bool) -> None:
    if auto:
        lsg_patch.enable_auto_patching()
    try:
        run = trainer(
            lsg_patch.from_pretrained(saved),
            tmp_path / "run",
            load_best_model_at_end=True,
            eval_strategy="steps",
            eval_steps=2,
            metric_for_best_model="loss",
        )
        run.train()
    finally:
        lsg_patch.disable_auto_patching()
    best = lsg_patch.from_pretrained(run.state.best_model_checkpoint)
    assert lsg_patch.is_patched(run.model)
    assert torch.equal(logits_of(run.model), logits_of(best))


def test_sentence_transformer_trainer(saved: Path, tmp_path: Path) -> None:
    """It loads its checkpoints by SentenceTransformer, so it needs auto patching to go on."""
    texts = [" ".join(f"w{(i * j) % 90}" for i in range(70 + j)) for j in range(16)]
    data = Dataset.from_dict({"anchor": texts, "positive": texts[::-1]})

    def run(**given: Any) -> Any:
        model = SentenceTransformer(str(saved), device="cpu")
        arguments = SentenceTransformerTrainingArguments(
            str(tmp_path / "run"),
            max_steps=4,
            save_steps=2,
            eval_steps=2,
            eval_strategy="steps",
            logging_steps=1,
            per_device_train_batch_size=4,
            load_best_model_at_end=True,
            report_to=[],
            use_cpu=True,
        )
        loss = MultipleNegativesRankingLoss(model)
        done = SentenceTransformerTrainer(
            model, arguments, train_dataset=data, eval_dataset=data, loss=loss
        )
        done.train(**given)
        return done

    with lsg_patch.auto_patching():
        whole = run()
        resumed = run(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert lsg_patch.is_patched(resumed.model)
    found = [[e["loss"] for e in x.state.log_history if "loss" in e] for x in (whole, resumed)]
    assert found[0] == found[1]
    assert (whole.model.encode([TEXT]) == resumed.model.encode([TEXT])).all()


PARTS = {
    "bert.embeddings": "cpu",
    "bert.encoder": "disk",
    "bert.pooler": "cpu",
    "classifier": "cpu",
}


@pytest.mark.parametrize(
    "places",
    [
        "auto",
        {"": "cpu"},
        PARTS,
        pytest.param(
            {"": "disk"},
            marks=pytest.mark.skipif(  # reason: 4.x fails while it loads the weights
                transformers.__version__ < "5",
                reason="transformers 4.x loads no whole model to disk",
            ),
        ),
    ],
    ids=str,
)
def test_device_map(saved: Path, tmp_path: Path, places: Any) -> None:
    """Global tokens come to where the model's words are looked up, offloaded ones too."""
    expected = logits_of(lsg_patch.from_pretrained(saved))
    loaded = lsg_patch.from_pretrained(saved, device_map=places, offload_folder=tmp_path / "off")
    assert torch.equal(logits_of(loaded), expected)
