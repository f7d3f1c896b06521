"""`lsg-patch tune`: which settings find most in texts of one's own, without labels.

A query is a passage without some of its words, and looks for the text that it is taken from. The
benchmark of quality draws and ranks by the same functions.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lsg_patch.chunking import chunk_embeddings
from lsg_patch.config import LSGConfig
from lsg_patch.holders import tokenizer_in
from lsg_patch.patching import patched

PASSAGE = 40  # tokens of a query
DROPPED = 0.3  # of its words
RESAMPLES = 2000
# None: not patched, long texts in windows that overlap (or cut, by a SentenceTransformer's own ways)
CANDIDATES: tuple[dict[str, Any] | None, ...] = (
    None,
    {},
    {"sparsity_type": "none", "position_period": 256},
    {"block_size": 64, "sparsity_type": "none", "position_period": 128},
    {"block_size": 64, "sparse_block_size": 64, "position_period": 128},
)


@dataclass(frozen=True)
class Document:
    name: str
    text: str
    offsets: tuple[tuple[int, int], ...]  # of its tokens, in characters

    def span(self, first: int, last: int) -> tuple[int, int]:
        """The characters of the tokens from ``first`` to before ``last``."""
        return self.offsets[first][0], self.offsets[min(last, len(self.offsets)) - 1][1]

    def part(self, first: int, last: int) -> str:
        return self.text[slice(*self.span(first, last))]


@dataclass(frozen=True)
class Query:
    text: str
    document: int  # the index of that which it is taken from


def tokenized(tokenizer: Any, strings: Sequence[str], size: int | None = None) -> list[Document]:
    """Without names and special tokens, each cut to ``size`` tokens."""
    found = []
    for text in strings:
        rows = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )["offset_mapping"][:size]
        found.append(Document("", text[: rows[-1][1]] if size and rows else text, tuple(rows)))
    return found


def read_texts(paths: Sequence[Path]) -> list[str]:
    """Those of files: of a .jsonl the ``text`` of each line, of a folder its .txt files."""
    files = [
        f for path in paths for f in (sorted(path.rglob("*.txt")) if path.is_dir() else [path])
    ]
    texts = []
    for file in files:
        try:
            found = [file.read_text(encoding="utf-8-sig")]
            if file.suffix == ".jsonl":  # other ends of lines than this may be in a text
                found = [json.loads(x)["text"] for x in found[0].split("\n") if x.strip()]
            if not all(isinstance(text, str) for text in found):
                raise TypeError("a text is no string")
            texts += found
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{file} is no text, and no .jsonl with a line {{"text": ...}} for each '
                f"({type(error).__name__}: {error})"
            ) from error
    return texts


def passages(
    documents: Sequence[Document], each: int, lengths: Sequence[int], seed: int
) -> list[Query]:
    """``each`` queries of every document: passages of these ``lengths`` in tokens, from anywhere, two
    of them half a document apart, without ``DROPPED`` of their words; none that another one has too,
    so that a document may have fewer.
    """
    draw, queries = random.Random(seed), []
    for index, document in enumerate(documents):
        others = [other.text for i, other in enumerate(documents) if i != index]
        apart = len(document.offsets) // 2
        last = max(0, len(document.offsets) - apart * (len(lengths) - 1) - lengths[-1])
        starts, wanted = draw.sample(range(last), last), each
        while starts and wanted:
            begin = starts.pop()
            found = [
                document.part(begin + i * apart, begin + i * apart + length)
                for i, length in enumerate(lengths)
            ]
            words = " ".join(found).split()
            if not words or any(part in other for part in found for other in others):
                continue
            kept = draw.sample(range(len(words)), max(1, round(len(words) * (1 - DROPPED))))
            queries.append(Query(" ".join(words[i] for i in sorted(kept)), index))
            wanted -= 1
    return queries


def reciprocal_ranks(queries: Tensor, vectors: Tensor, targets: Sequence[int]) -> Tensor:
    """Of each query's document, by its nearest vector; a tie counts against it."""
    scores = torch.einsum("qw,dnw->qdn", queries, vectors).amax(-1)
    own = scores[torch.arange(len(targets)), torch.tensor(targets)]
    return 1 / (scores >= own[:, None]).sum(1)


def interval(values: Tensor, targets: Sequence[int], seed: int) -> list[float]:
    """The mean of ``values``, and both ends of its 95% interval, documents being drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    of = torch.tensor(targets).unique(return_inverse=True)[1]  # of those that have queries
    sums = torch.zeros(int(of.max()) + 1).index_add(0, of, values)
    counts = torch.bincount(of).float()
    drawn = torch.randint(len(sums), (RESAMPLES, len(sums)), generator=generator)
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    return [float(values.mean()), *means.quantile(torch.tensor([0.025, 0.975])).tolist()]


def embedded(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    chunk_tokens: int | None,
    role: str = "document",
) -> Tensor:
    """A vector for each chunk of each text, (texts, chunks, width); the last ones may come twice.

    One vector a text is that of a SentenceTransformer itself, for this ``role`` (query or document).
    """
    if chunk_tokens is None and tokenizer_in(model) is not None:  # a SentenceTransformer
        # sentence-transformers 5 and later have a method for each, with its own prompt
        encode = getattr(model, f"encode_{role}", model.encode)
        rows = encode(list(texts), convert_to_tensor=True, show_progress_bar=False)
        return torch.nn.functional.normalize(rows.float().cpu(), dim=-1)[:, None]
    found = [x.embeddings for x in chunk_embeddings(model, tokenizer, texts, chunk_tokens or 10**6)]
    most = max(map(len, found))
    return torch.stack([x[torch.arange(most).clamp(max=len(x) - 1)] for x in found])


def tune(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    max_length: int = 4096,
    chunk_tokens: int | None = None,
    queries: int = 4,
    candidates: Sequence[dict[str, Any] | None] = CANDIDATES,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """What each of the ``candidates`` finds: a row each, the model is as before.

    Args:
        model: a model without its head, or a SentenceTransformer.
        chunk_tokens: a vector for each so many tokens; None: one for each text, which is a
            SentenceTransformer's own: not patched, it reads as much as it does by itself.
        queries: of each text.

    Raises:
        ValueError: fewer than two texts have passages of their own, or all are so short that every
            setting reads them alike.
    """
    if tokenizer is None:
        raise ValueError("the model has no tokenizer: save one into its folder")
    special = tokenizer.num_special_tokens_to_add()
    cut = [text[: 16 * max_length] for text in texts]
    documents = tokenized(tokenizer, cut, max_length - special)
    asked = passages(documents, queries, (PASSAGE,), seed)
    targets = [query.document for query in asked]
    if len(set(targets)) < 2:
        raise ValueError(
            f"{len(set(targets))} of {len(texts)} texts have a passage of {PASSAGE} tokens that no other "
            "one has: pass two at least, better fifty"
        )
    alike = min(2 * LSGConfig(**x).block_size for x in candidates if x is not None)
    longest = max(len(document.offsets) for document in documents) + special
    if longest <= alike:
        raise ValueError(
            f"the longest text has {longest} tokens, and up to {alike} all settings read alike: pass "
            "longer texts"
        )
    fitting = [x if x is None else _fitting(model, tokenizer, x, max_length) for x in candidates]
    ranks, seconds = [], []
    for settings in fitting:
        with nullcontext() if settings is None else patched(model, tokenizer=tokenizer, **settings):
            start = time.perf_counter()
            vectors = embedded(model, tokenizer, [d.text for d in documents], chunk_tokens)
            seconds.append(time.perf_counter() - start)
            whole = chunk_tokens and 10**6  # by the same way as the documents
            questions = embedded(model, tokenizer, [q.text for q in asked], whole, "query")[:, 0]
        ranks.append(reciprocal_ranks(questions, vectors, targets))
    means = [-1.0 if x is None else float(r.mean()) for x, r in zip(fitting, ranks, strict=True)]
    best, first = means.index(max(means)), ranks[next(i for i, x in enumerate(fitting) if x)]
    return [
        {
            "settings": settings,
            "mrr": interval(own, targets, seed),
            "more_than_defaults": interval(own - first, targets, seed),
            "recall_at_1": interval((own == 1).float(), targets, seed),
            "seconds": spent,
            "queries": len(asked),
            "best": i == best,
        }
        for i, (settings, own, spent) in enumerate(zip(fitting, ranks, seconds, strict=True))
    ]


def _fitting(
    model: Any, tokenizer: Any, settings: dict[str, Any], max_length: int
) -> dict[str, Any]:
    """These settings, without a ``position_period`` that the model cannot have."""
    settings = {**settings, "max_position_embeddings": max_length}
    try:
        with patched(model, tokenizer=tokenizer, **settings):
            return settings
    except ValueError:
        if settings.pop("position_period", None) is None:
            raise
    return settings


def cells(row: dict[str, Any]) -> dict[str, str]:
    """A row of ``tune`` for people, short enough for a terminal."""
    settings = row["settings"]
    if settings is None:
        name = "not patched"
    elif len(settings) == 1:
        name = "defaults"
    else:
        config = LSGConfig(**settings)
        period = config.position_period or "all"
        name = f"{config.sparsity_type} {config.block_size}, {period} rows"
    numbers = {
        "MRR": "{:.3f} [{:.3f}, {:.3f}]".format(*row["mrr"]),
        "more than the defaults": "{:+.3f} [{:+.3f}, {:+.3f}]".format(*row["more_than_defaults"]),
        "recall@1": f"{row['recall_at_1'][0]:.3f}",
    }
    short = {key: re.sub(r"\b0\.", ".", text) for key, text in numbers.items()}
    return {"": name + " *" * row["best"], **short, "seconds": f"{row['seconds']:.1f}"}


def verdict(rows: Sequence[dict[str, Any]], has_tokenizer: bool = False) -> list[str]:
    """The call that patches with the best settings, and what to think of it.

    ``has_tokenizer``: the model holds its own.
    """
    [best] = [row for row in rows if row["best"]]
    given = ", ".join(f"{name}={value!r}" for name, value in best["settings"].items())
    given += "" if has_tokenizer else ", tokenizer=tokenizer"
    said = [f"lsg_patch.patch_model(model, {given})"]
    if best["more_than_defaults"][1] <= 0 and len(best["settings"]) > 1:
        said.append("Its interval over the defaults includes 0: more texts may tell.")
    if any(row["settings"] is None and row["mrr"][0] >= best["mrr"][0] for row in rows):
        said.append("Not patched, as much is found or more.")
    return said
