"""Adapt a sentence encoder to long documents, without labels.

    python examples/adapt_embeddings.py --out adapted
    python examples/adapt_embeddings.py --train mine.jsonl --test others.jsonl --parts new_positions

A passage of a document, without a part of its words, is drawn towards the document that holds it and
away from the others of the batch. What that gains is measured on texts of another source, by one
vector and by many, and what it costs on short pairs: names of functions and what they do.

By default it trains on the documentation of the standard library and is measured on descriptions of
packages and comments of modules, as `python -m benchmarks quality` is.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer

import lsg_patch
from lsg_patch.demo import bundled_model
from lsg_patch.tuning import (
    PASSAGE,
    Document,
    embedded,
    interval,
    passages,
    read_texts,
    reciprocal_ranks,
    tokenized,
)

Pair = tuple[str, str]  # two short texts, of which the first looks for the second


# The texts


def sources(args: argparse.Namespace, tokenizer: Any) -> tuple[list[Document], list[Document]]:
    """Documents to train on and, of another source, to measure with, of `--max-length` tokens at most."""
    found = []
    for option, path, count in (("train", args.train, 1000), ("test", args.test, args.documents)):
        if path is None:
            sys.path.insert(0, str(Path(__file__).parents[1]))
            from benchmarks import texts

            own = option == "train"
            drawn = texts.documentation() if own else texts.descriptions_and_comments(0)
            documents = texts.choose(drawn, count, args.max_length, tokenizer)
        else:
            size = args.max_length - tokenizer.num_special_tokens_to_add()
            try:
                documents = tokenized(tokenizer, read_texts([path]), size)
            except ValueError as error:
                raise SystemExit(f"--{option}: {error}") from None
        documents = [x for x in documents if len(x.offsets) > 2 * PASSAGE]
        if len(documents) < 2:
            raise SystemExit(f"--{option}: two texts of {2 * PASSAGE} tokens are needed, at least")
        found.append(documents)
    return found[0], found[1]


def short_pairs(path: Path | None, count: int = 400) -> list[Pair]:
    """Those of a .jsonl, `{"texts": [a, b]}` a line; by default functions of networkx, and what they do."""
    if path:
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            rows = [json.loads(line) for line in lines if line.strip()]
            return [(str(a), str(b)) for a, b in (row["texts"] for row in rows)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(
                f'--pairs {path}: a file is wanted with a line {{"texts": [a, b]}} for each pair ({error})'
            ) from None
    spec = find_spec("networkx")
    found: dict[str, str] = {}
    for root in (spec and spec.submodule_search_locations) or ():
        for file in sorted(Path(root).rglob("*.py")):
            if "tests" in file.parts:
                continue
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                told = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
                if told and isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                    sentence = re.split(r"(?<=\.)\s|\n\n", told)[0]
                    found.setdefault(" ".join(sentence.split()), node.name.replace("_", " "))
    pairs = [(name, told) for told, name in sorted(found.items())]
    random.Random(0).shuffle(pairs)
    return pairs[:count]


# Training


def pooled(model: Any, tokenizer: Any, texts: Sequence[str], max_length: int) -> Tensor:
    """Means of the tokens' outputs, of length 1."""
    inputs = tokenizer(
        list(texts), truncation=True, max_length=max_length, padding=True, return_tensors="pt"
    ).to(model.device)
    hidden = model(**inputs).last_hidden_state
    weights = inputs["attention_mask"].unsqueeze(-1)
    return normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def contrast(queries: Tensor, documents: Tensor, targets: Tensor) -> Tensor:
    """Each query is to find its document among those of the batch."""
    return cross_entropy(queries @ documents.T / 0.05, targets)


def gradients(
    model: Any,
    tokenizer: Any,
    queries: Sequence[str],
    documents: Sequence[str],
    targets: Tensor,
    max_length: int,
    micro_batch: int | None,
) -> float:
    """The loss of a batch, and its gradients.

    With the gradient cache, `micro_batch` texts at a time are in memory: all are read without a graph,
    the loss is derived by their vectors, and then each is read again for the rest of the way.
    """
    sides = (queries, documents)
    if micro_batch is None:
        asked, read = (pooled(model, tokenizer, x, max_length) for x in sides)
        loss = contrast(asked, read, targets)
        loss.backward()
        return loss.item()
    groups = [[x[i : i + micro_batch] for i in range(0, len(x), micro_batch)] for x in sides]
    with torch.no_grad():
        both = [torch.cat([pooled(model, tokenizer, x, max_length) for x in of]) for of in groups]
    for vectors in both:
        vectors.requires_grad_()
    loss = contrast(both[0], both[1], targets)
    loss.backward()
    for of, vectors in zip(groups, both, strict=True):
        assert vectors.grad is not None
        for texts, wanted in zip(of, vectors.grad.split(micro_batch), strict=True):
            (pooled(model, tokenizer, texts, max_length) * wanted).sum().backward()
    return loss.item()


def train(model: Any, tokenizer: Any, documents: list[Document], args: argparse.Namespace) -> None:
    """Without dropout, so that the gradient cache reads twice the same."""
    parameters = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.01)
    draw = random.Random(args.seed)
    order: list[Document] = []
    losses: list[float] = []
    bar = tqdm(range(args.steps), "training")
    for number in bar:
        if len(order) < args.batch_size:
            order = draw.sample(documents, len(documents))
        chosen, order = order[: args.batch_size], order[args.batch_size :]
        windows = []
        for document in chosen:
            size = min(args.train_tokens, len(document.offsets))
            begin = draw.randrange(len(document.offsets) - size + 1)
            windows += tokenized(tokenizer, [document.part(begin, begin + size)])
        asked = passages(windows, args.queries, (PASSAGE,), args.seed + number)
        if not asked:
            continue
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (number + 1) / 5) * (1 - number / args.steps)
        losses.append(
            gradients(
                model,
                tokenizer,
                [x.text for x in asked],
                [x.text for x in windows],
                torch.tensor([x.document for x in asked], device=model.device),
                args.max_length,
                args.micro_batch,
            )
        )
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=sum(losses[-10:]) / len(losses[-10:]))


# What it finds


def measure(
    model: Any, tokenizer: Any, documents: list[Document], pairs: list[Pair]
) -> dict[str, tuple[Tensor, list[int]]]:
    """Reciprocal ranks, and the document of each: by one vector, by many, and of short pairs."""
    asked = passages(documents, 4, (PASSAGE,), seed=0)
    targets = [x.document for x in asked]
    queries = embedded(model, tokenizer, [x.text for x in asked], 10**6)[:, 0]
    # both from one reading: the whole text, and parts of 256 tokens
    spans = [
        [x.span(0, len(x.offsets)), *(x.span(i, i + 256) for i in range(0, len(x.offsets), 256))]
        for x in documents
    ]
    read = lsg_patch.chunk_embeddings(
        model, tokenizer, [x.text for x in documents], boundaries=spans, batch_size=2
    )
    most = max(len(x.spans) for x in read)
    vectors = torch.stack(
        [x.embeddings[torch.arange(most).clamp(max=len(x.spans) - 1)] for x in read]
    )
    found = {
        "one vector": (reciprocal_ranks(queries, vectors[:, :1], targets), targets),
        "a vector for 256 tokens": (reciprocal_ranks(queries, vectors[:, 1:], targets), targets),
    }
    names, told = (embedded(model, tokenizer, x, 10**6) for x in zip(*pairs, strict=True))
    each = list(range(len(pairs)))
    found["short pairs"] = reciprocal_ranks(names[:, 0], told, each), each
    return found


def report(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a table: means with their intervals, and how much more there is than before."""
    rows = []
    for name, (first, targets) in before.items():
        last = after[name][0]
        for kind, of in (("MRR", lambda x: x), ("recall@1", lambda x: (x == 1).float())):
            values = {"before": of(first), "after": of(last), "more": of(last) - of(first)}
            row = {key: interval(value, targets, 0) for key, value in values.items()}
            rows.append({"what": f"{name}, {kind}", **row})
    return rows


def shown(row: dict[str, Any]) -> str:
    cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*row[key]) for key in ("before", "after")]
    cells.append("{:+.4f} [{:+.4f}, {:+.4f}]".format(*row["more"]))
    return f"| {row['what']} | {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Adapt an encoder to long texts, without labels.")
    add = parser.add_argument
    add("--model", help="name or folder; default: all-MiniLM-L6-v2, of the extra `demo`")
    add("--train", type=Path, help="a text, a folder of .txt or a .jsonl with `text`")
    add("--test", type=Path, help="the same, of another source")
    add("--documents", type=int, default=48, help="to measure with, where there is no --test")
    add("--pairs", type=Path, help='short ones, a .jsonl of {"texts": [a, b]}; default: networkx')
    add("--out", type=Path, default=Path("adapted"))
    add("--parts", nargs="+", default=["all"], help="as freeze_except has them, or all")
    add("--steps", type=int, default=40)
    add("--batch-size", type=int, default=8, help="documents of a step")
    add("--queries", type=int, default=4, help="of each document in a step")
    add("--micro-batch", type=int, help="texts in memory at a time, by the gradient cache")
    add("--lr", type=float, default=2e-5)
    add("--max-length", type=int, default=2048, help="tokens that are read")
    add("--train-tokens", type=int, default=10**6, help="of a document in a step, from anywhere")
    add("--block-size", type=int, default=64)
    add("--sparsity-type", default="none")
    add("--position-period", type=int, default=128, help="0: all rows are tiled")
    add("--seed", type=int, default=0)
    add("--threads", type=int, help="of torch")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.batch_size < 2 or args.queries < 1 or (args.micro_batch or 1) < 1 or args.steps < 0:
        raise SystemExit("--batch-size 2, --queries 1 and --micro-batch 1 are the least")
    if args.out.exists() and any(args.out.iterdir()):
        raise SystemExit(f"--out {args.out} is not empty: name another one")

    name = str(args.model or bundled_model())
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModel.from_pretrained(name).eval()
        lsg_patch.patch_model(
            model,
            tokenizer=tokenizer,
            max_position_embeddings=args.max_length,
            block_size=args.block_size,
            sparsity_type=args.sparsity_type,
            position_period=args.position_period or None,
        )
        if args.parts != ["all"]:
            lsg_patch.freeze_except(model, *args.parts)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{name}: {error}") from None
    training, testing = sources(args, tokenizer)
    pairs = short_pairs(args.pairs)
    if len(pairs) < 2:
        raise SystemExit("two short pairs are needed: install networkx, or give --pairs")
    learning = sum(x.numel() for x in model.parameters() if x.requires_grad)
    print(
        f"{len(training)} documents to train on, {len(testing)} to measure with, {len(pairs)} short "
        f"pairs; {learning:,} parameters learn"
    )
    short = [text for pair in pairs[:50] for text in pair]
    first_vectors = embedded(model, tokenizer, short, 10**6)
    before = measure(model, tokenizer, testing, pairs)
    start = time.perf_counter()
    train(model, tokenizer, training, args)
    seconds = time.perf_counter() - start
    rows = report(before, measure(model, tokenizer, testing, pairs))
    same = torch.equal(first_vectors, embedded(model, tokenizer, short, 10**6))

    print(
        f"\n{args.steps} steps in {seconds:.0f} s\n\n| | before | after | more |\n|---|---|---|---|"
    )
    print("\n".join(map(shown, rows)))
    print(f"\nvectors of short texts are bit for bit what they were: {same}")
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    results = {"seconds": seconds, "rows": rows, "short texts are the same": same}
    results["options"] = {key: str(value) for key, value in vars(args).items()}
    (args.out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    again = lsg_patch.from_pretrained(args.out).eval()
    assert torch.equal(
        embedded(again, tokenizer, short, 10**6), embedded(model, tokenizer, short, 10**6)
    )
    print(f"saved, and loaded back: lsg_patch.from_pretrained({str(args.out)!r})")


if __name__ == "__main__":
    main()
