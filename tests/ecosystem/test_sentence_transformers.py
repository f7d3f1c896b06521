"""Models of sentence-transformers: the one-line upgrade, its revert, and their trainer."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import datasets
import pytest
import sentence_transformers
import torch
import transformers
from safetensors.torch import load_file
from sentence_transformers.sentence_transformer import modules
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

import lsg_patch
from lsg_patch.demo import bundled_model
from tests.models import POSITIONS, tiny_model
from tests.test_patching import SETTINGS, assert_bitwise, values
from tests.tokenizers import real_tokenizer, text_of


def folder_of(path: Path, head: str) -> str:
    real_tokenizer(path)
    tiny_model("bert", getattr(transformers, head)).save_pretrained(path)
    return str(path)


def encoder(path: Path) -> Any:
    part = modules.Transformer(folder_of(path, "BertModel"))
    return sentence_transformers.SentenceTransformer(modules=[part, modules.Pooling(32)])


@pytest.mark.parametrize(
    ("cls", "head", "call"),
    [
        ("SentenceTransformer", "BertModel", "encode"),
        ("CrossEncoder", "BertForSequenceClassification", "predict"),
        ("SparseEncoder", "BertForMaskedLM", "encode"),
    ],
)
def test_one_line_makes_it_read_long_texts(cls: str, head: str, call: str, tmp_path: Path) -> None:
    model = getattr(sentence_transformers, cls)(folder_of(tmp_path, head), device="cpu")
    # only what stands behind the model's own 64 tokens differs
    begun, other = text_of(100), text_of(100)[: -len(" w100")] + " w7 w8 w9"
    texts: list[Any] = [begun, other]
    if cls == "CrossEncoder":
        texts = [("w5", text) for text in texts]

    def differ() -> bool:
        first, second = (torch.as_tensor(x) for x in getattr(model, call)(texts))
        if first.is_sparse:
            first, second = first.to_dense(), second.to_dense()
        return bool((first - second).abs().max() > 1e-5)

    own = values(model)
    assert model.max_seq_length == POSITIONS and not differ()
    assert lsg_patch.patch_model(model, **SETTINGS) is model
    assert model.max_seq_length == 200 and differ()
    clones = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    model.max_seq_length = 8192  # by hand
    lsg_patch.unpatch_model(model)
    assert model.max_seq_length == POSITIONS and not differ()
    assert_bitwise(values(model), own)
    for clone in clones:
        assert clone.max_seq_length == 200
        lsg_patch.unpatch_model(clone)
        assert clone.max_seq_length == POSITIONS
        assert_bitwise(values(clone), own)


def test_a_length_of_documents_that_was_chosen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    part = modules.Transformer(folder_of(tmp_path, "BertModel"), document_length=48)
    lsg_patch.patch_model(
        sentence_transformers.SentenceTransformer(modules=[part, modules.Pooling(32)]), **SETTINGS
    )
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("lsg_patch")]
    assert "document_length=48 of Transformer" in message


def test_real_weights_see_the_end_of_a_long_text() -> None:
    """A sentence behind 600 words of something else is found only by the patched model."""
    part = modules.Transformer(bundled_model())
    model = sentence_transformers.SentenceTransformer(
        modules=[part, modules.Pooling(part.get_embedding_dimension())]
    )
    filler = "The committee met on Tuesday and spoke about the budget of the town. " * 60
    fact = "The volcano erupted and covered the village with hot ash and lava. " * 12
    texts = [filler, filler + fact]

    def gain() -> float:
        question = model.encode("a volcanic eruption", convert_to_tensor=True)
        plain, told = model.encode(texts, convert_to_tensor=True) @ question
        return float(told - plain)

    before = gain()
    with lsg_patch.patched(model):
        assert gain() > 0.02
    assert abs(before) < 1e-6 and gain() == before


def test_the_trainer_never_mixes_two_checkpoints(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It loads a checkpoint into a new model that is not patched, which drops the global tokens."""
    model = lsg_patch.patch_model(encoder(tmp_path), **SETTINGS)
    pairs = {"sentence1": ["w5 w6"] * 4, "sentence2": ["w7"] * 4, "score": [0.0, 1.0, 0.0, 1.0]}
    data = datasets.Dataset.from_dict(pairs)
    trainer = sentence_transformers.SentenceTransformerTrainer(
        model=model,
        args=sentence_transformers.SentenceTransformerTrainingArguments(
            str(tmp_path / "run"),
            num_train_epochs=2,
            per_device_train_batch_size=4,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=True,  # so that the first one is the best
            learning_rate=1e-2,
            use_cpu=True,
            disable_tqdm=True,
            report_to=[],
        ),
        train_dataset=data,
        eval_dataset=data,
        loss=CosineSimilarityLoss(model),
    )
    with caplog.at_level(logging.ERROR):
        trainer.train()
    best, last = (tmp_path / "run" / f"checkpoint-{step}" for step in (1, 2))
    assert trainer.state.best_model_checkpoint == str(best)
    saved = load_file(last / "model.safetensors")
    base = model[0].auto_model
    own = values(base)
    assert_bitwise({name: saved[name] for name in own}, own)
    assert "Could not load the best model" in caplog.text and "nothing was loaded" in caplog.text
    base.load_state_dict(load_file(best / "model.safetensors"))  # what the message says
    assert not torch.equal(
        lsg_patch.global_embeddings(model), saved["embeddings.global_embeddings.weight"]
    )
    with pytest.raises(RuntimeError, match=r"lsg_patch\.auto_patching\(\)"):
        trainer.train(resume_from_checkpoint=str(best))
    with lsg_patch.auto_patching():
        trainer.train(resume_from_checkpoint=str(best))
    saved, own = load_file(best / "model.safetensors"), values(base)
    assert_bitwise({name: saved[name] for name in own}, own)  # the best one again


def test_the_period_is_the_length_that_it_was_used_at(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = encoder(tmp_path)
    model.max_seq_length = 40
    with caplog.at_level(logging.INFO, "lsg_patch"):
        lsg_patch.patch_model(model, **SETTINGS, position_period="trained")
    assert lsg_patch.get_config(model).position_period == 40
    assert "position_period is 40, the " in caplog.text
    rows = model[0].auto_model.embeddings.position_embeddings.weight
    assert torch.equal(rows, rows[torch.arange(200) % 40])
