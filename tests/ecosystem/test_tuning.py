"""`lsg-patch tune` on sentence-transformers: by the model's own pooling and prompts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import sentence_transformers
import torch
from sentence_transformers.sentence_transformer import modules

import lsg_patch
from lsg_patch import cli, tuning
from tests.ecosystem.test_chunking import folder_of
from tests.test_tuning import own_texts, run


def sentence_encoder(tmp_path: Path, pooling: str) -> sentence_transformers.SentenceTransformer:
    part = modules.Transformer(folder_of(tmp_path, "BertModel"))
    return sentence_transformers.SentenceTransformer(
        modules=[part, modules.Pooling(32, pooling_mode=pooling)],
        prompts={"query": "w9 w9 ", "document": ""},
        device="cpu",
    )


def test_its_own_pooling_and_prompts(tmp_path: Path, capsys: Any) -> None:
    encoder = sentence_encoder(tmp_path, "cls")
    encoder.save_pretrained(str(tmp_path / "encoder"))
    (tmp_path / "texts").mkdir()
    texts = own_texts(tmp_path / "texts")
    arguments = ("tune", tmp_path / "encoder", "--file", *texts, "--max-length", 256)
    assert run(*arguments, "--json") == 0
    rows = json.loads(capsys.readouterr().out)

    strings = tuning.read_texts(texts)
    documents = tuning.tokenized(encoder.tokenizer, strings, 254)
    asked = tuning.passages(documents, 4, (tuning.PASSAGE,), 0)
    for row in rows:
        if row["settings"] is not None:
            lsg_patch.patch_model(encoder, **row["settings"])
        vectors = torch.as_tensor(encoder.encode_document([d.text for d in documents]))
        queries = torch.as_tensor(encoder.encode_query([query.text for query in asked]))
        ranks = tuning.reciprocal_ranks(
            torch.nn.functional.normalize(queries, dim=-1),
            torch.nn.functional.normalize(vectors, dim=-1)[:, None],
            [query.document for query in asked],
        )
        assert row["mrr"][0] == pytest.approx(float(ranks.mean()))
        if row["settings"] is not None:
            lsg_patch.unpatch_model(encoder)
    assert len({tuple(row["mrr"]) for row in rows}) > 1  # the settings are not read alike

    assert run(*arguments) == 0
    [line] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("lsg_patch.patch")]
    exec(line, {"lsg_patch": lsg_patch, "model": encoder})
    assert lsg_patch.get_config(encoder).max_position_embeddings == 256
    # the vectors of chunks are means
    assert run(*arguments, "--chunk-tokens", 32) == 2
    assert "'cls', and a chunk has only a mean" in capsys.readouterr().err


def test_without_sentence_transformers(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentence_encoder(tmp_path, "mean").save_pretrained(str(tmp_path / "encoder"))
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    texts = own_texts(tmp_path)
    assert cli.main(["tune", str(tmp_path / "encoder"), "--file", str(texts[0])]) == 2
    assert "is a SentenceTransformer: pip install sentence-transformers" in capsys.readouterr().err
