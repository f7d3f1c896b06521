"""Pipelines on texts of more than 512 tokens, in batches: their results are the model's own for each text."""

from __future__ import annotations

import itertools
import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import lsg_patch
from tests import seq2seq
from tests.models import VOCABULARY, tiny_model
from tests.tokenizers import real_tokenizer

SETTINGS: dict[str, Any] = {
    "block_size": 16,
    "sparse_block_size": 16,
    "max_position_embeddings": 700,
}


def words(count: int, seed: int) -> str:
    drawn = random.Random(seed).choices(range(5, VOCABULARY), k=count)
    return " ".join(f"w{i}" for i in drawn)


# as a batch they are padded
TEXTS = [words(600, 1), words(20, 2), words(540, 3)]


def pipe_of(task: str, head: str, folder: Path, **kwargs: Any) -> Any:
    labels = {"id2label": {0: "no", 1: "entailment"}, "label2id": {"no": 0, "entailment": 1}}
    model = tiny_model("bert", getattr(transformers, head), **(labels if "zero" in task else {}))
    tokenizer = real_tokenizer(folder)
    pipe = transformers.pipeline(task, model=model, tokenizer=tokenizer, device=-1, **kwargs)
    return lsg_patch.patch_model(pipe, **SETTINGS)


def outputs(pipe: Any, *text: str) -> Any:
    """What the model gives for one text, or for a pair."""
    with torch.no_grad():
        return pipe.model(**pipe.tokenizer(*text, return_tensors="pt"))


def close(found: Any, expected: Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=0, atol=1e-5)


def test_text_classification(tmp_path: Path) -> None:
    pipe = pipe_of("text-classification", "BertForSequenceClassification", tmp_path)
    for text, found in zip(TEXTS, pipe(TEXTS, batch_size=3, top_k=None), strict=True):
        scores = {each["label"]: each["score"] for each in found}
        close([scores["LABEL_0"], scores["LABEL_1"]], outputs(pipe, text).logits[0].softmax(-1))


@pytest.mark.parametrize("strategy", ["simple", "first"])
def test_token_classification_gives_places_in_the_text(strategy: str, tmp_path: Path) -> None:
    pipe = pipe_of("token-classification", "BertForTokenClassification", tmp_path)
    found = pipe(TEXTS, batch_size=3, aggregation_strategy=strategy)
    for text, groups in zip(TEXTS, found, strict=True):
        scores, labels = outputs(pipe, text).logits[0, 1:-1].softmax(-1).max(-1)
        ends = list(itertools.accumulate(len(word) + 1 for word in text.split()))
        first = 0
        for label, same in itertools.groupby(labels.tolist()):
            group, last = groups.pop(0), first + len(list(same))
            start, end = (0, *ends)[first], ends[last - 1] - 1
            expected = (f"LABEL_{label}", start, end, text[start:end])
            assert tuple(group[x] for x in ("entity_group", "start", "end", "word")) == expected
            close(float(group["score"]), scores[first:last].mean())
            first = last
        assert not groups and first == len(text.split())


def test_feature_extraction(tmp_path: Path) -> None:
    pipe = pipe_of("feature-extraction", "BertModel", tmp_path, truncation=True)
    found = pipe(TEXTS, batch_size=2, return_tensors=True)
    for text, rows in zip(TEXTS, found, strict=True):
        expected = outputs(pipe, text)[0]
        close(rows[:, : expected.shape[1]], expected)


def test_fill_mask(tmp_path: Path) -> None:
    pipe = pipe_of("fill-mask", "BertForMaskedLM", tmp_path, top_k=3)
    texts = [f"{words(length, 4)} [MASK] {words(30, 5)}" for length in (560, 9, 530)]
    for length, text, found in zip((560, 9, 530), texts, pipe(texts, batch_size=3), strict=True):
        best = outputs(pipe, text).logits[0, 1 + length].softmax(-1).topk(3)
        assert [each["token"] for each in found] == best.indices.tolist()
        close([each["score"] for each in found], best.values)


@pytest.mark.parametrize("several", [False, True])
def test_zero_shot_classification(several: bool, tmp_path: Path) -> None:
    pipe = pipe_of("zero-shot-classification", "BertForSequenceClassification", tmp_path)
    labels = ["w7", "w9", "w40"]
    found = pipe(TEXTS, labels, hypothesis_template="w5 {}", multi_label=several, batch_size=4)
    for text, result in zip(TEXTS, found, strict=True):
        logits = torch.cat([outputs(pipe, text, f"w5 {label}").logits for label in labels])
        expected = logits.softmax(-1)[:, 1] if several else logits[:, 1].softmax(-1)
        scores = dict(zip(result["labels"], result["scores"], strict=True))
        close([scores[label] for label in labels], expected)


@pytest.mark.skipif(
    not hasattr(transformers, "QuestionAnsweringPipeline"),
    reason="this transformers has no pipeline for question answering (5.x)",
)
def test_question_answering(tmp_path: Path) -> None:
    pipe = pipe_of("question-answering", "BertForQuestionAnswering", tmp_path)
    question = "w5 w6"
    found = pipe(question=[question] * 3, context=TEXTS, batch_size=2, max_answer_len=4)
    for text, answer in zip(TEXTS, found, strict=True):
        output = outputs(pipe, question, text)
        start, end = (x[0, 4:-1].softmax(-1) for x in (output.start_logits, output.end_logits))
        best = (start[:, None] * end).triu().tril(3).argmax().item()
        first, last = divmod(int(best), len(end))
        assert answer["answer"] == " ".join(text.split()[first : last + 1])
        assert text[answer["start"] : answer["end"]] == answer["answer"]


@pytest.mark.skipif(
    not hasattr(transformers, "SummarizationPipeline"),
    reason="this transformers has no pipeline for summarization (5.x)",
)
def test_summarization(tmp_path: Path) -> None:
    model = seq2seq.tiny_model("bart", "ForConditionalGeneration")
    tokenizer = real_tokenizer(tmp_path)
    pipe = transformers.pipeline("summarization", model=model, tokenizer=tokenizer, device=-1)
    lsg_patch.patch_model(pipe, **SETTINGS)
    length = {"max_new_tokens": 8, "min_length": 0, "do_sample": False, "num_beams": 1}
    found = [each["summary_text"] for each in pipe(TEXTS, batch_size=3, **length)]
    inputs = [tokenizer(x, return_tensors="pt", return_token_type_ids=False) for x in TEXTS]
    expected = [tokenizer.decode(model.generate(**x, **length)[0], True) for x in inputs]
    assert found == expected and len(set(found)) == 3


class TestBadInput:
    def test_a_pipeline_without_a_tokenizer(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        pipe = pipe_of("feature-extraction", "BertModel", tmp_path)
        lsg_patch.unpatch_model(pipe)
        pipe.tokenizer = None
        lsg_patch.patch_model(pipe, **SETTINGS)
        assert "no tokenizer was given" in caplog.text and "tokenizer= raises that" in caplog.text

    @pytest.mark.parametrize(
        ("family", "overrides", "message"),
        [
            ("roberta", {}, "pads with 0 and the model with 1"),
            ("bert", {"vocab_size": 100}, "has 120 tokens and the model 100"),
        ],
        ids=["padding", "vocabulary"],
    )
    def test_a_tokenizer_of_another_model(
        self,
        family: str,
        overrides: dict[str, Any],
        message: str,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        model = tiny_model(family, **overrides)
        with caplog.at_level(logging.WARNING):
            lsg_patch.patch_model(model, tokenizer=real_tokenizer(tmp_path), **SETTINGS)
        [line] = caplog.messages
        assert message in line and "the model's own" in line
