"""Adapt a masked language model to long texts: its loss at long and at short length, before and after.

    python examples/adapt_mlm.py --model bert-base-uncased --train texts/ --test others.jsonl
    python examples/adapt_mlm.py --model bert-base-uncased --parts global new_positions --lr 1e-3

By default it trains on the documentation of the standard library, and is measured on what the
docstrings of networkx say. `--parts` says what learns, as `lsg_patch.freeze_except` has it.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import AutoModelForMaskedLM, AutoTokenizer

import lsg_patch
from lsg_patch.demo import MODULES, module_text
from lsg_patch.tuning import interval, read_texts

MASKED = 0.15  # of the tokens


def docstrings(package: str) -> list[str]:
    """What the modules of a package say, in their order."""
    spec, texts = find_spec(package), []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for root in (spec and spec.submodule_search_locations) or ():
        for file in sorted(Path(root).rglob("*.py")):
            if "tests" not in file.parts:
                nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
                told = [ast.get_docstring(x) for x in nodes if isinstance(x, kinds)]
                texts.append("\n\n".join(filter(None, told)))
    return texts


def token_rows(tokenizer: Any, texts: Sequence[str], longest: int, least: int) -> list[Tensor]:
    """Of each text the ids, `longest` at most, of those that have `least` of them."""
    rows = tokenizer(list(texts), truncation=True, max_length=longest)["input_ids"]
    return [torch.tensor(row) for row in rows if len(row) >= least]


def masked(tokenizer: Any, row: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A row with some of its tokens hidden, all by the mask, and what they were (else -100)."""
    special = torch.isin(row, torch.tensor(tokenizer.all_special_ids))
    drawn = torch.rand(len(row), generator=generator) + special
    chosen = drawn <= max(MASKED, float(drawn.min()))  # one at least
    return row.masked_fill(chosen, tokenizer.mask_token_id), row.masked_fill(~chosen, -100)


def loss_of(model: Any, tokenizer: Any, row: Tensor, generator: torch.Generator) -> Tensor:
    inputs, labels = (x.to(model.device) for x in masked(tokenizer, row, generator))
    logits = model(input_ids=inputs[None], attention_mask=torch.ones_like(inputs)[None]).logits
    return cross_entropy(logits[0].float(), labels)


@torch.no_grad()
def losses(model: Any, tokenizer: Any, rows: list[Tensor], length: int) -> Tensor:
    """That of each text, up to `length` tokens; the same tokens are hidden whenever it is called."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    cut = [x if len(x) <= length else torch.cat([x[: length - 1], x[-1:]]) for x in rows]
    return torch.stack([loss_of(model, tokenizer, x, generator).cpu() for x in cut])


def train(model: Any, tokenizer: Any, rows: list[Tensor], args: argparse.Namespace) -> None:
    parameters = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.01)
    generator, draw = torch.Generator().manual_seed(args.seed), random.Random(args.seed)
    torch.manual_seed(args.seed)
    model.train()
    order: list[Tensor] = []
    bar = tqdm(range(args.steps), "training")
    for number in bar:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (number + 1) / 5) * (1 - number / args.steps)
        total = 0.0
        for _ in range(args.batch_size):
            order = order or draw.sample(rows, len(rows))
            loss = loss_of(model, tokenizer, order.pop(), generator) / args.batch_size
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=total)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Adapt a masked language model to long texts.")
    add = parser.add_argument
    add("--model", required=True, help="name or folder of one that was trained as such")
    add("--train", type=Path, help="a text, a folder of .txt or a .jsonl with `text`")
    add("--test", type=Path, help="the same, others")
    add("--documents", type=int, default=40, help="to measure with, at most")
    add("--out", type=Path, default=Path("adapted-mlm"))
    add("--parts", nargs="+", default=["all"], help="as freeze_except has them, or all")
    add("--steps", type=int, default=100)
    add("--batch-size", type=int, default=4, help="texts of a step, one after the other")
    add("--lr", type=float, default=2e-5)
    add("--max-length", type=int, default=2048, help="tokens that are read")
    add("--block-size", type=int, default=128)
    add("--sparsity-type", default="norm")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.batch_size < 1 or args.steps < 0:
        raise SystemExit(f"--batch-size {args.batch_size}, --steps {args.steps}: 1 and 0 at least")
    if args.out.exists() and any(args.out.iterdir()):
        raise SystemExit(f"--out {args.out} is not empty: name another one")
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model, loading = AutoModelForMaskedLM.from_pretrained(args.model, output_loading_info=True)
        # what is in another place of the model too (a decoder that is the words) is not missing
        if any("transform" in key or "lm_head.dense" in key for key in loading["missing_keys"]):
            raise ValueError("it has no masked language model's head: name a model that has")
        lsg_patch.patch_model(
            model,
            tokenizer=tokenizer,
            max_position_embeddings=args.max_length,
            block_size=args.block_size,
            sparsity_type=args.sparsity_type,
        )
        if args.parts != ["all"]:
            lsg_patch.freeze_except(model, *args.parts)
        given = read_texts([args.train]) if args.train else [module_text(x) for x in MODULES]
        others = read_texts([args.test]) if args.test else docstrings("networkx")
    except (OSError, ValueError) as error:
        raise SystemExit(f"{args.model}: {error}") from None
    short = 2 * args.block_size  # what is read as before the patch
    training, testing = (
        token_rows(tokenizer, texts, args.max_length, short + 1) for texts in (given, others)
    )
    testing = testing[: args.documents]
    if not training or not testing:
        raise SystemExit(f"no text to train on, or none to measure with, has {short + 1} tokens")

    lengths = {"long": args.max_length, "short": short}
    before = {x: losses(model, tokenizer, testing, size) for x, size in lengths.items()}
    train(model, tokenizer, training, args)
    after = {x: losses(model, tokenizer, testing, size) for x, size in lengths.items()}
    each, results = list(range(len(testing))), {}
    print("\n| tokens | loss before | after | more |\n|---|---|---|---|")
    for name, first in before.items():
        values = (first, after[name], after[name] - first)
        results[name] = [interval(value, each, 0) for value in values]
        cells = ["{:.4f} [{:.4f}, {:.4f}]".format(*x) for x in results[name]]
        print(f"| up to {lengths[name]:,} | {' | '.join(cells)} |")
    print(f"\nshort texts are as they were: {torch.equal(before['short'], after['short'])}")
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    again = lsg_patch.from_pretrained(args.out)
    assert torch.equal(losses(again, tokenizer, testing, args.max_length), after["long"])
    print(f"saved, and loaded back: lsg_patch.from_pretrained({str(args.out)!r})")


if __name__ == "__main__":
    main()
