"""``chunk_embeddings`` of a SentenceTransformer, and sentences by sentencex."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import sentence_transformers
import torch
from sentence_transformers.sentence_transformer import modules

import lsg_patch
from lsg_patch.demo import bundled_model
from tests.ecosystem.test_sentence_transformers import folder_of

TEXTS = [
    "Dr. Ada wrote the first program. It was never run, since the machine was never built! Was it?  Yes.",
    "A long text goes on. " * 150,
    "",
]


@pytest.mark.parametrize("settings", [None, {"block_size": 64, "position_period": 128}])
def test_one_chunk_is_what_encode_gives(settings: dict[str, Any] | None) -> None:
    model = sentence_transformers.SentenceTransformer(bundled_model(), device="cpu")
    if settings:
        lsg_patch.patch_model(model, sparsity_type="none", **settings)
    texts = TEXTS if settings else [TEXTS[0], TEXTS[2]]  # the other is cut to 256 tokens by encode
    expected = torch.as_tensor(model.encode(texts))
    found = lsg_patch.chunk_embeddings(model, None, texts, chunk_tokens=4000, normalize=False)
    torch.testing.assert_close(
        torch.cat([chunks.embeddings for chunks in found]), expected, rtol=0, atol=1e-5
    )


def test_what_comes_after_the_mean_is_applied(tmp_path: Path) -> None:
    part = modules.Transformer(folder_of(tmp_path, "BertModel"))
    dense = modules.Dense(32, 5)
    model = sentence_transformers.SentenceTransformer(modules=[part, modules.Pooling(32), dense])
    model = model.to("cpu")
    expected = torch.as_tensor(model.encode(["w5 w6 w7"]))
    [chunks] = lsg_patch.chunk_embeddings(model, None, ["w5 w6 w7"], normalize=False)
    torch.testing.assert_close(chunks.embeddings, expected, rtol=0, atol=1e-5)


def test_a_vector_is_cut_as_encode_cuts_it(tmp_path: Path) -> None:
    part = modules.Transformer(folder_of(tmp_path, "BertModel"))
    model = sentence_transformers.SentenceTransformer(
        modules=[part, modules.Pooling(32)], truncate_dim=8, device="cpu"
    )
    expected = torch.as_tensor(model.encode(["w5 w6 w7"], normalize_embeddings=True))
    [chunks] = lsg_patch.chunk_embeddings(model, None, ["w5 w6 w7"])
    assert chunks.embeddings.shape == (1, 8)
    torch.testing.assert_close(chunks.embeddings, expected, rtol=0, atol=1e-5)


def test_what_is_no_mean_is_refused(tmp_path: Path) -> None:
    part = modules.Transformer(folder_of(tmp_path, "BertModel"))
    pooling = modules.Pooling(32, pooling_mode="cls")
    model = sentence_transformers.SentenceTransformer(modules=[part, pooling], device="cpu")
    with pytest.raises(ValueError, match="'cls', and a chunk has only a mean: pass the encoder"):
        lsg_patch.chunk_embeddings(model, None, ["w5"])
    lsg_patch.chunk_embeddings(model[0].auto_model, model.tokenizer, ["w5"])
    model = sentence_transformers.SentenceTransformer(
        modules=[part, modules.Pooling(32)], prompts={"doc": "w9 "}, default_prompt_name="doc"
    )
    with pytest.raises(ValueError, match="default_prompt_name='doc' puts words before each text"):
        lsg_patch.chunk_embeddings(model, None, ["w5"])


def test_whole_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sentence_transformers.SentenceTransformer(bundled_model(), device="cpu")

    def sentences(chunk_tokens: int, overlap: int = 0) -> list[str]:
        [chunks] = lsg_patch.chunk_embeddings(
            model, None, TEXTS[:1], chunk_tokens, overlap, boundaries="sentences"
        )
        assert len(chunks.embeddings) == len(chunks.spans)
        return [TEXTS[0][begin:end] for begin, end in chunks.spans]

    first, second, third, fourth = (
        "Dr. Ada wrote the first program.",
        "It was never run, since the machine was never built!",
        "Was it?",
        "Yes.",
    )
    assert sentences(12) == [first, second, f"{third}  {fourth}"]
    assert sentences(100) == [TEXTS[0]]
    # what was in the chunk before comes again where there is room for it
    assert sentences(15, overlap=4) == [first, f"{second} {third}", f"{third}  {fourth}"]
    # a sentence that is too long is cut
    assert sentences(8)[1:3] == ["It was never run, since the machine", "was never built! Was it?"]
    monkeypatch.setitem(sys.modules, "sentencex", None)
    with pytest.raises(ImportError, match=r"pip install lsg-patch\[sentences\]"):
        sentences(12)
