"""Models of sentence-transformers: the one-line upgrade, its revert, and their trainer."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
import re
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
import pytest
import sentence_transformers
import torch
import transformers
from safetensors.torch import load_file
from sentence_transformers.sentence_transformer import modules
from sentence_transformers.sentence_transformer.losses import ContrastiveLoss, CosineSimilarityLoss
from sentence_transformers.util import quantize_embeddings
from torch.nn.functional import normalize

import lsg_patch
from lsg_patch.demo import bundled_model
from tests.models import POSITIONS, tiny_model
from tests.test_patching import SETTINGS, assert_bitwise, values
from tests.tokenizers import real_tokenizer, text_of


def folder_of(path: Path, head: str) -> str:
    real_tokenizer(path)
    tiny_model("bert", getattr(transformers, head)).save_pretrained(path)
    return str(path)


KINDS = pytest.mark.parametrize(
    ("cls", "head", "call"),
    [
        ("SentenceTransformer", "BertModel", "encode"),
        ("CrossEncoder", "BertForSequenceClassification", "predict"),
        ("SparseEncoder", "BertForMaskedLM", "encode"),
    ],
)


def encoder(path: Path) -> Any:
    part = modules.Transformer(folder_of(path, "BertModel"))
    return sentence_transformers.SentenceTransformer(modules=[part, modules.Pooling(32)])


@KINDS
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


@pytest.mark.skipif(  # reason: sentence-transformers before 6.0 has no such length
    "document_length" not in inspect.signature(modules.Transformer).parameters,
    reason="this sentence-transformers has no length of documents (before 6.0)",
)
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


@KINDS
def test_batches_are_as_one_by_one_and_come_back(
    cls: str, head: str, call: str, tmp_path: Path
) -> None:
    model = getattr(sentence_transformers, cls)(folder_of(tmp_path, head), device="cpu")
    lsg_patch.patch_model(model, **{**SETTINGS, "max_position_embeddings": 700})
    texts: list[Any] = [text_of(600), text_of(9), text_of(530), text_of(77)]
    if cls == "CrossEncoder":
        texts = [("w5", text) for text in texts]

    def found(of: Any, batch_size: int) -> torch.Tensor:
        rows = getattr(of, call)(texts, batch_size=batch_size, convert_to_tensor=True)
        return rows.to_dense() if rows.is_sparse else rows

    alone = found(model, 1)
    torch.testing.assert_close(found(model, 3), alone, rtol=0, atol=1e-5)
    model.save_pretrained(str(tmp_path / "saved"))
    with lsg_patch.auto_patching():
        again = getattr(sentence_transformers, cls)(str(tmp_path / "saved"), device="cpu")
    assert again.max_seq_length == 700 and torch.equal(found(again, 1), alone)


# real weights on texts of 3,000 words, against the model's own rows for each text alone


@pytest.fixture(scope="module")
def real() -> Any:
    model = sentence_transformers.SentenceTransformer(
        bundled_model(), device="cpu", prompts={"query": "Find what this is about: "}
    )
    return lsg_patch.patch_model(model)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    words = re.findall("[A-Za-z]+", " ".join(topics.values()))
    return [" ".join(words[at : at + count]) for at, count in ((0, 3000), (9000, 40), (5000, 3000))]


def mean_row(model: Any, text: str) -> torch.Tensor:
    tokens = model.tokenizer(text, return_tensors="pt")
    length = tokens["input_ids"].shape[1]
    assert 3000 < length < 4096 or length < 100
    with torch.no_grad():
        rows: torch.Tensor = model[0].auto_model(**tokens).last_hidden_state[0]
    return rows.mean(0)


@pytest.fixture(scope="module")
def expected(real: Any, texts: list[str]) -> torch.Tensor:
    return torch.stack([mean_row(real, text) for text in texts])


def test_long_texts_in_a_batch(real: Any, texts: list[str], expected: torch.Tensor) -> None:
    found = real.encode(texts, batch_size=3, convert_to_tensor=True)
    torch.testing.assert_close(found, normalize(expected, dim=1), rtol=0, atol=1e-5)


def test_long_texts_normalized_by_encode(
    real: Any, texts: list[str], expected: torch.Tensor
) -> None:
    bare = sentence_transformers.SentenceTransformer(modules=[real[0], real[1]])
    found = bare.encode(texts[1:], convert_to_tensor=True)
    torch.testing.assert_close(found, expected[1:], rtol=0, atol=1e-5)
    found = bare.encode(texts[1:2], normalize_embeddings=True, convert_to_tensor=True)
    torch.testing.assert_close(found, normalize(expected[1:2], dim=1), rtol=0, atol=1e-5)


def test_long_texts_with_a_prompt(real: Any, texts: list[str]) -> None:
    found = real.encode(texts[2], prompt_name="query", convert_to_tensor=True)
    row = mean_row(real, real.prompts["query"] + texts[2])
    torch.testing.assert_close(found, normalize(row, dim=0), rtol=0, atol=1e-5)


def test_int8_and_several_processes(tmp_path: Path) -> None:
    model = lsg_patch.patch_model(encoder(tmp_path), **SETTINGS)
    texts = [text_of(length) for length in (150, 9, 120, 190)]
    alone = model.encode(texts, batch_size=1)
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        shared = model.encode(texts, pool=pool, chunk_size=2)
        assert abs(shared - alone).max() < 1e-5
    finally:
        model.stop_multi_process_pool(pool)
    found = model.encode(texts, precision="int8").astype(int)
    assert abs(found - quantize_embeddings(alone, "int8").astype(int)).max() <= 1


def test_a_contrastive_loss_learns_from_the_end_of_long_texts(tmp_path: Path) -> None:
    """Only what stands behind the model's own 64 tokens says which texts go together."""
    model, begun = lsg_patch.patch_model(encoder(tmp_path), **SETTINGS), text_of(80)
    ends = [" w7" * 40, " w9" * 40]
    pairs = [(one, other) for one in ends for other in ends]
    data = datasets.Dataset.from_dict(
        {
            "sentence1": [begun + one for one, _ in pairs] * 2,
            "sentence2": [begun + " w20" + other for _, other in pairs] * 2,
            "label": [float(one == other) for one, other in pairs] * 2,
        }
    )
    rows = lsg_patch.global_embeddings(model).detach().clone()
    trainer = sentence_transformers.SentenceTransformerTrainer(
        model=model,
        args=sentence_transformers.SentenceTransformerTrainingArguments(
            str(tmp_path / "run"),
            max_steps=6,
            per_device_train_batch_size=8,
            learning_rate=5e-3,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            report_to=[],
        ),
        train_dataset=data,
        loss=ContrastiveLoss(model),
    )
    trainer.train()
    losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    assert losses[-1] < 0.1 * losses[0]
    assert (lsg_patch.global_embeddings(model) - rows).abs().max() > 1e-3
    asked = [begun + ends[0], begun + " w20" + ends[0], begun + ends[1]]
    one, same, other = model.encode(asked, normalize_embeddings=True)
    assert one @ same > one @ other + 0.3
    lsg_patch.unpatch_model(model)
    one, other = model.encode([begun + end for end in ends])
    assert model.max_seq_length == POSITIONS and abs(one - other).max() < 1e-6


def test_what_holds_no_encoder_is_refused(tmp_path: Path) -> None:
    static = modules.StaticEmbedding(real_tokenizer(tmp_path), embedding_dim=8)
    model = sentence_transformers.SentenceTransformer(modules=[static], device="cpu")
    with pytest.raises(TypeError, match="holds no model of a family that can be patched"):
        lsg_patch.patch_model(model, **SETTINGS)
