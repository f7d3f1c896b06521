"""The examples that adapt a model to long texts, with a tiny model and few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lsg_patch
from tests.ecosystem.test_examples import example, model_folder, write_rows


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """Texts of two sources, and pairs, each of words of its own."""
    generator = torch.Generator().manual_seed(0)

    def words(count: int, low: int = 5, high: int = 119) -> str:
        return " ".join(f"w{x}" for x in torch.randint(low, high, (count,), generator=generator))

    arguments = ["--out", str(tmp_path / "out"), "--max-length", "200", "--block-size", "8"]
    for name in ("train", "test"):
        rows = [{"text": words(150 + 10 * i)} for i in range(6)]
        arguments += [f"--{name}", str(write_rows(tmp_path / f"{name}.jsonl", rows))]
    rows = [{"texts": [words(4), words(6)]} for _ in range(8)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    return arguments


@pytest.fixture
def embeddings(given: list[str], tmp_path: Path) -> list[str]:
    arguments = ["--model", str(model_folder(tmp_path / "tiny", "BertModel")), *given]
    arguments += ["--pairs", str(tmp_path / "pairs.jsonl"), "--position-period", "16"]
    return [*arguments, "--batch-size", "4", "--queries", "2", "--lr", "0.01"]


def test_embeddings_learn_and_are_saved(embeddings: list[str], tmp_path: Path, capsys: Any) -> None:
    example("adapt_embeddings").main([*embeddings, "--steps", "4"])
    told = capsys.readouterr().out
    assert "saved, and loaded back" in told and "bit for bit what they were: False" in told
    results = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert len(results["rows"]) == 6
    for row in results["rows"]:
        assert row["more"][0] == pytest.approx(row["after"][0] - row["before"][0], abs=1e-6)
        for mean, low, high in (row["before"], row["after"]):
            assert 0 <= low <= mean <= high <= 1


def test_new_positions_alone_leave_short_texts(
    embeddings: list[str], tmp_path: Path, capsys: Any
) -> None:
    example("adapt_embeddings").main([*embeddings, "--steps", "3", "--parts", "new_positions"])
    assert "bit for bit what they were: True" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    for row in results["rows"][4:]:
        assert row["more"] == [0, 0, 0] and row["what"].startswith("short pairs")
    before = transformers.AutoModel.from_pretrained(tmp_path / "tiny").state_dict()
    table = lsg_patch.from_pretrained(tmp_path / "out").embeddings.position_embeddings.weight
    old = before["embeddings.position_embeddings.weight"]
    assert torch.equal(table[:16], old[:16])
    assert not torch.equal(table[16:64], old[:16].repeat(3, 1))


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_the_gradient_cache_gives_the_gradients_of_the_whole(
    micro_batch: int, embeddings: list[str]
) -> None:
    adapt = example("adapt_embeddings")
    tokenizer = transformers.AutoTokenizer.from_pretrained(embeddings[1])
    model = transformers.AutoModel.from_pretrained(embeddings[1]).eval()
    lsg_patch.patch_model(model, tokenizer=tokenizer, block_size=8, max_position_embeddings=200)
    documents = [" ".join(f"w{5 + (7 * i * j + j) % 114}" for j in range(150)) for i in range(1, 5)]
    queries = [" ".join(x.split()[n : n + 20]) for x in documents for n in (30, 90)]
    targets = torch.tensor([i // 2 for i in range(8)])

    def gradients(size: int | None) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        loss = adapt.gradients(model, tokenizer, queries, documents, targets, 200, size)
        return loss, [x.grad.clone() for x in model.parameters() if x.grad is not None]

    (loss, whole), (again, cached) = gradients(None), gradients(micro_batch)
    assert again == pytest.approx(loss, abs=1e-5) and loss > 0.01
    for one, other in zip(whole, cached, strict=True):
        assert torch.allclose(one, other, atol=1e-5, rtol=1e-3)
    assert any(x.abs().max() > 1e-3 for x in whole)


@pytest.mark.parametrize("parts", [["all"], ["new_positions"]], ids="-".join)
def test_a_language_model_learns_and_is_saved(
    parts: list[str], given: list[str], tmp_path: Path, capsys: Any
) -> None:
    model = str(model_folder(tmp_path / "tiny", "BertForMaskedLM"))
    steps = ["--steps", "12", "--batch-size", "2", "--lr", "0.02"]
    example("adapt_mlm").main(["--model", model, *given, *steps, "--parts", *parts])
    results = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    alone = parts == ["new_positions"]
    assert f"short texts are as they were: {alone}" in capsys.readouterr().out
    assert (results["short"][2] == [0, 0, 0]) == alone
    if not alone:  # at least which words there are
        assert results["long"][2][0] < -0.01


def test_wrong_requests(embeddings: list[str], tmp_path: Path) -> None:
    main, mlm = example("adapt_embeddings").main, example("adapt_mlm").main
    for wrong, message in (
        (["--train", str(tmp_path / "nowhere")], "--train: .*nowhere is no text"),
        (["--pairs", str(tmp_path / "train.jsonl")], "--pairs .*for each pair"),
        (["--parts", "no-such"], "freeze_except: pass some of"),
        (["--model", str(tmp_path / "nothing")], "nothing: "),
        (["--out", str(tmp_path)], "--out .* is not empty"),
        (["--batch-size", "1"], "--batch-size 2"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([*embeddings, *wrong])
    own = embeddings[: embeddings.index("--pairs")]  # what both have
    with pytest.raises(SystemExit, match="it has no masked language model's head"):
        mlm(own)
    assert not (tmp_path / "out").exists()
