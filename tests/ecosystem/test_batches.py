"""The benchmark of sentence-transformers' batches: its texts are of the lengths it says, on both sides."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from benchmarks import comparisons, peers
from tests.test_benchmarks import measured


def test_texts_have_the_lengths_of_a_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = peers.sentence_transformer(layers=1)
    texts = peers.texts_of(model, 256, 64, 512)
    lengths = sorted(len(ids) for ids in model.tokenizer(texts)["input_ids"])
    assert 64 <= lengths[0] < 80 and 400 < lengths[-1] <= 512 and 150 < lengths[128] < 220
    assert lengths[-1] <= model.max_seq_length  # or the unpatched side would read less
    monkeypatch.setattr(comparisons, "NUM_TEXTS", 3)
    cases = measured(tmp_path, "batches", "--lengths", "64", "300")
    assert {case: [r["side"] for r in records] for case, records in cases.items()} == {
        f"64 to 300 tokens, {size} texts at a time": ["unpatched", "norm"] for size in (8, 32, 128)
    }


def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert peers.sentence_transformer(layers=1) is None
    assert (
        "batches is left out: it is not installed (pip install sentence-transformers)"
        in capsys.readouterr().err
    )
