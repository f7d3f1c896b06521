"""`python -m benchmarks quality`: what an encoder finds in long texts, read in several ways.

Each passage is looked for among all documents of its source; the mean reciprocal rank, with 95% bootstrap
intervals over documents. Settings are chosen on source A (*) and reported on B.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks import texts
from benchmarks.store import conditions
from lsg_patch import chunk_embeddings, patched
from lsg_patch.demo import bundled_model, load_encoder
from lsg_patch.tuning import Document, interval, passages, reciprocal_ranks, tokenized

PARTS = (8, 16, 32)  # of a document: a vector each
# of queries: the tokens of each of their passages
KINDS = {
    "passage": (40,),
    "two passages": (20, 20),
}
# the ways to read by which pass keys and needles are looked for as well
NEEDLES = ("patched, defaults", "patched, none 64, 128 rows")


@dataclass(frozen=True)
class Reading:
    """A way to read a document: in separate ``parts``, unpatched, or as a whole by these ``settings``."""

    name: str
    parts: int = 1
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def finds_needles(self) -> bool:
        return self.parts == PARTS[0] or self.name in NEEDLES


def readings(tokens: int) -> list[Reading]:
    """All ways; the first one of each number of vectors is what the others are held to."""
    none = {"sparsity_type": "none"}
    full = {**none, "block_size": tokens // 2}  # up to two blocks everything sees everything
    settings: dict[str, dict[str, Any]] = {
        "full attention, all rows tiled": full,
        "full attention, 128 rows": {**full, "position_period": 128},
        "patched, defaults": {},
        "patched, interpolate": {"positions": "interpolate"},
        "patched, norm 64, 128 rows": {
            "block_size": 64,
            "sparse_block_size": 64,
            "position_period": 128,
        },
        "patched, none 128, all rows": none,
        "patched, none 128, 256 rows": {**none, "position_period": 256},
        "patched, none 64, 128 rows": {**none, "block_size": 64, "position_period": 128},
        "patched, none 32, 128 rows": {**none, "block_size": 32, "position_period": 128},
    }
    apart = [Reading(f"separate chunks of {tokens // parts}", parts) for parts in PARTS]
    return apart + [Reading(name, 1, own) for name, own in settings.items()]


def spans_of(document: Document, parts: int, tokens: int) -> list[tuple[int, int]]:
    """Of ``parts`` equal parts of a document of ``tokens``, special ones among them."""
    size = tokens // parts
    return [document.span(i, i + size) for i in range(0, len(document.offsets), size)]


@dataclass
class Encoder:
    model: Any
    tokenizer: Any

    def embed(self, strings: Sequence[str]) -> Tensor:
        """One vector each, (n, width)."""
        found = chunk_embeddings(self.model, self.tokenizer, strings, 10**6, batch_size=32)
        return torch.cat([chunks.embeddings for chunks in found])

    def whole(self, strings: Sequence[str], spans: Sequence[Any]) -> list[Tensor]:
        """A vector for each of the ``spans`` of every text, from one reading of it."""
        found = chunk_embeddings(
            self.model, self.tokenizer, strings, boundaries=spans, batch_size=2
        )
        return [chunks.embeddings for chunks in found]

    def vectors(
        self, reading: Reading, documents: Sequence[Document], tokens: int
    ) -> dict[int, Tensor]:
        """Those of each document, by their number: (documents, number, width)."""
        numbers = PARTS if reading.parts == 1 else (reading.parts,)
        spans = [[x for n in numbers for x in spans_of(d, n, tokens)] for d in documents]
        if reading.parts == 1:
            spans = [[(0, len(d.text)), *x] for d, x in zip(documents, spans, strict=True)]
            found = torch.stack(self.whole([d.text for d in documents], spans))
            return dict(zip((1, *PARTS), found.split((1, *PARTS), dim=1), strict=True))
        pieces = [d.text[slice(*x)] for d, own in zip(documents, spans, strict=True) for x in own]
        many = self.embed(pieces).view(len(documents), reading.parts, -1)
        return {1: normalize(many.mean(1, keepdim=True), dim=-1), reading.parts: many}


def found_needles(
    encoder: Encoder, reading: Reading, documents: Sequence[Document], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Which of ten documents with a pass key or a fact are found, from the front to the back."""
    tokenizer, rows, size = encoder.tokenizer, [], options.tokens // 8
    for length in options.lengths:
        hidden = {
            "pass key": texts.passkeys(length, tokenizer, options.seed),
            "needle": texts.needles(length, tokenizer, documents),
        }
        for kind, (strings, questions) in hidden.items():
            found = tokenized(tokenizer, strings)
            parts = [[d.span(i, i + size) for i in range(0, length - 2, size)] for d in found]
            if reading.parts == 1:
                spans = [[(0, len(d.text)), *x] for d, x in zip(found, parts, strict=True)]
                vectors = [(x[:1], x[1:]) for x in encoder.whole(strings, spans)]
            else:
                apart = [
                    encoder.embed([d.text[slice(*x)] for x in own])
                    for d, own in zip(found, parts, strict=True)
                ]
                vectors = [(normalize(x.mean(0, keepdim=True), dim=-1), x) for x in apart]
            asked = encoder.embed(questions)
            for number, kept in zip(("one", "many"), zip(*vectors, strict=True), strict=True):
                ranks = reciprocal_ranks(asked, torch.stack(kept), range(len(strings)))
                rows.append(
                    {
                        "reading": reading.name,
                        "kind": kind,
                        "tokens": length,
                        "vectors": number,
                        "found": "".join("+" if rank == 1 else "." for rank in ranks),
                    }
                )
    return rows


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All numbers as plain data; what there is of them is written after each reading."""
    model, tokenizer = load_encoder(bundled_model())
    tokens, seed = options.tokens, options.seed
    drawn = {"A": texts.documentation(), "B": texts.descriptions_and_comments(seed)}
    sources = {
        name: texts.choose(found, count, tokens, tokenizer)
        for (name, found), count in zip(drawn.items(), options.documents, strict=True)
    }
    report: dict[str, Any] = {
        "conditions": conditions(cast("Any", model).config.num_hidden_layers),
        "tokens": tokens,
        "seed": seed,
        "queries of each document and kind": options.queries,
        "documents": {name: [d.name for d in documents] for name, documents in sources.items()},
        "rows": [],
        "needles": [],
    }
    encoder, length = Encoder(model, tokenizer), max(tokens, *options.lengths)
    ranks: dict[Any, Tensor] = {}
    asked: dict[Any, Tensor] = {}
    for reading in readings(tokens):
        if options.readings and not any(part in reading.name for part in options.readings):
            continue
        settings = {"max_position_embeddings": length, **reading.settings}
        in_force = (
            nullcontext() if reading.parts > 1 else patched(model, tokenizer=tokenizer, **settings)
        )
        with in_force:
            for source, documents in sources.items():
                vectors = encoder.vectors(reading, documents, tokens)
                for kind, lengths in KINDS.items():
                    queries = passages(documents, options.queries, lengths, seed)
                    # what else there is to set changes no text of two blocks
                    of = (source, kind, reading.settings.get("positions"))
                    if of not in asked:
                        asked[of] = encoder.embed([query.text for query in queries])
                    targets = [query.document for query in queries]
                    for number, found in vectors.items():
                        ranks[kind, number, reading.name, source] = reciprocal_ranks(
                            asked[of], found, targets
                        )
            if reading.finds_needles:
                report["needles"] += found_needles(encoder, reading, sources["B"], options)
        report["rows"] = _rows(ranks, options)
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"{reading.name}: done", file=sys.stderr)
    return report


def _rows(ranks: dict[Any, Tensor], options: argparse.Namespace) -> list[dict[str, Any]]:
    """For each kind of query and number of vectors: the ways, each also against the first of them."""
    rows = []
    for kind, number in dict.fromkeys(key[:2] for key in ranks):
        names = dict.fromkeys(name for k, n, name, _ in ranks if (k, n) == (kind, number))
        means = {name: ranks[kind, number, name, "A"].mean() for name in names}
        first, best = next(iter(names)), max(means, key=means.__getitem__)
        for name in names:
            row = {"queries": kind, "vectors": number, "reading": name, "chosen": name == best}
            for source in "AB":
                own, other = (ranks[kind, number, x, source] for x in (name, first))
                targets = [i // options.queries for i in range(len(own))]
                row[source] = interval(own, targets, options.seed)
                row[f"{source}, more than the first"] = interval(own - other, targets, options.seed)
            rows.append(row)
    order = {kind: i for i, kind in enumerate(KINDS)}
    return sorted(rows, key=lambda row: (order[row["queries"]], row["vectors"]))


def render(report: dict[str, Any]) -> str:
    """The report as Markdown."""

    def shown(values: list[float], sign: str = "") -> str:
        return "{:{s}.3f} [{:{s}.3f}, {:{s}.3f}]".format(*values, s=sign)

    lines = [
        "| queries | vectors | read as | A | B | B, more than the first |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        cells = [row["queries"], str(row["vectors"]), row["reading"] + " *" * row["chosen"]]
        cells += [shown(row["A"]), shown(row["B"]), shown(row["B, more than the first"], "+")]
        lines.append(f"| {' | '.join(cells)} |")
    lengths = list(dict.fromkeys(row["tokens"] for row in report["needles"]))
    lines += ["", f"| hidden | vectors | read as | {' | '.join(f'{n} tokens' for n in lengths)} |"]
    lines.append("|---|---|---|" + "---|" * len(lengths))
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in report["needles"]:
        found.setdefault((row["kind"], row["vectors"], row["reading"]), []).append(row["found"])
    lines += [f"| {' | '.join([*key, *cells])} |" for key, cells in sorted(found.items())]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks quality", description=__doc__)
    parser.add_argument("--documents", type=int, nargs=2, default=(40, 48), metavar=("A", "B"))
    parser.add_argument("--tokens", type=int, default=2048, help="of a document")
    parser.add_argument("--queries", type=int, default=4, help="of each document and kind")
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=(512, 1024, 2048, 4096),
        help="of those with needles",
    )
    parser.add_argument("--readings", nargs="+", metavar="PART", help="only those with such a name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results there")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    print(render(measure(options)))
    return 0
