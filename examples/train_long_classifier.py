"""Fine-tune a patched encoder to classify long documents, on one process or on many.

    python examples/train_long_classifier.py
    accelerate launch --multi_gpu --num_processes 2 examples/train_long_classifier.py
    accelerate launch --use_fsdp --fsdp_version 2 --num_processes 2 examples/train_long_classifier.py

By default a document is all that the docstrings of a module of networkx, numpy or sympy say (which
torch and transformers bring along), and the question is whether it cites literature. The one place
that tells it may be anywhere in the text. `--data` reads other texts.

A step takes the same documents with the same dropout however many processes share it: two processes
give what one gives that accumulates twice as many batches. A run that was cut goes on with
`--resume`, also with another number of processes.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lsg_patch
from lsg_patch.demo import bundled_model

Document = tuple[str, str]  # text, class
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)  # any number of processes reads it


# The texts


def docstrings(source: str) -> str:
    """All docstrings of a module, in their order."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def library_documents(
    packages: Sequence[str] = ("networkx", "numpy", "sympy"), characters: int = 6000
) -> list[Document]:
    """Long documentation of scientific modules, and whether it cites literature anywhere.

    The marks that tell it, `.. [1]`, are taken out: what is left is an author, a title and a year.
    """
    mark = re.compile(r"^ *\.\. \[\w+\]|\[\w+\]_|^ *References?\n *[-=]+$", re.MULTILINE)
    documents = []
    for package in packages:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            continue
        for file in sorted(Path(spec.submodule_search_locations[0]).rglob("*.py")):
            if "tests" in file.parts or file.stat().st_size < characters:
                continue
            text = docstrings(file.read_text(encoding="utf-8"))
            if len(text) >= characters:
                cites = re.search(r"^ *\.\. \[\w+\]", text, re.MULTILINE)
                documents.append((mark.sub("", text), "cites" if cites else "cites nothing"))
    return documents


def read_documents(path: Path) -> list[Document]:
    """Texts and labels of a JSON Lines file."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
        return [(row["text"], str(row["label"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(
            f'--data {path}: a file is wanted with a line {{"text": ..., "label": ...}} for each '
            f"document ({type(error).__name__}: {error})"
        ) from None


def split(documents: list[Document], share: float, seed: int) -> tuple[list[Document], ...]:
    """Documents to train on and to test with, the same share of each class."""
    by_class: dict[str, list[Document]] = {}
    for document in documents:
        by_class.setdefault(document[1], []).append(document)
    if len(by_class) < 2 or min(map(len, by_class.values())) < 2:
        raise SystemExit(
            f"{len(documents)} documents of {len(by_class)} classes: two classes at least are "
            "needed, and two documents of each"
        )
    train, test = [], []
    for _, members in sorted(by_class.items()):
        random.Random(seed).shuffle(members)
        cut = max(1, round(share * len(members)))
        test += members[:cut]
        train += members[cut:]
    return train, test


# The model


def load(name: str, labels: list[str], args: argparse.Namespace) -> tuple[Any, Any]:
    """A patched model with a new head, the same in each process, and its tokenizer."""
    torch.manual_seed(args.seed)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSequenceClassification.from_pretrained(
            name,
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
        )
        lsg_patch.patch_model(
            model,
            tokenizer=tokenizer,
            max_position_embeddings=args.max_length,
            block_size=args.block_size,
            sparsity_type=args.sparsity_type,
        )
    except (OSError, ValueError) as error:
        raise SystemExit(f"{name}: {error}") from None
    return model, tokenizer


def distribute(model: Any, accelerator: Accelerator, sharded: bool) -> Any:
    """FSDP2 with each layer a unit, or DDP where there is more than one process."""
    model.to(accelerator.device)
    if sharded:
        # torch's own: that of accelerate is for GPUs alone, and does nothing on a CPU
        layers = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
        for layer in layers:
            fully_shard(layer)
        return fully_shard(model)
    return DistributedDataParallel(model) if accelerator.num_processes > 1 else model


def collate(tokenizer: Any, documents: list[Document], max_length: int, device: Any) -> Any:
    """Inputs (B, T) of a batch, on the device."""
    texts = [text for text, _ in documents]
    encoded = tokenizer(
        texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt"
    )
    return encoded.to(device)


# The run


def batch(number: int, size: int, documents: list[Document], seed: int) -> list[Document]:
    """The batch of this number: each epoch goes through all documents in an order of its own."""
    chosen = []
    for place in range(number * size, (number + 1) * size):
        epoch, index = divmod(place, len(documents))
        order = list(range(len(documents)))
        random.Random(f"{seed} {epoch}").shuffle(order)
        chosen.append(documents[order[index]])
    return chosen


def step(
    model: Any,
    tokenizer: Any,
    train: list[Document],
    number: int,
    args: argparse.Namespace,
    accelerator: Accelerator,
) -> float:
    """Gradients of the step of this number, and the mean loss over all processes."""
    labels = accelerator.unwrap_model(model).config.label2id
    total = torch.zeros((), device=accelerator.device)
    for part in range(args.accumulate):
        # among all batches of the run, of which the processes take turns
        place = (number * args.accumulate + part) * accelerator.num_processes
        place += accelerator.process_index
        documents = batch(place, args.batch_size, train, args.seed)
        inputs = collate(tokenizer, documents, args.max_length, accelerator.device)
        classes = torch.tensor([labels[label] for _, label in documents], device=total.device)
        torch.manual_seed(args.seed + place)  # the dropout of a batch, whichever process has it
        waits = part < args.accumulate - 1
        with accelerator.no_sync(model) if waits else nullcontext():
            with accelerator.autocast():
                loss = model(**inputs, labels=classes).loss / args.accumulate
            loss.backward()
        total += loss.detach()
    return float(accelerator.reduce(total, "mean"))


@torch.no_grad()
def accuracy(
    model: Any,
    tokenizer: Any,
    documents: list[Document],
    max_length: int,
    size: int,
    accelerator: Accelerator,
) -> float:
    """Share of the documents that get their class, read up to `max_length` tokens."""
    model.eval()
    names = accelerator.unwrap_model(model).config.id2label
    world, rank = accelerator.num_processes, accelerator.process_index
    # Some come twice, so that all processes have as many batches: FSDP wants that.
    places = [
        i % len(documents) for i in range(-(-len(documents) // (size * world)) * size * world)
    ]
    mine = places[rank::world]
    found = []
    for start in tqdm(range(0, len(mine), size), "evaluation", leave=False, disable=rank > 0):
        chosen = [documents[i] for i in mine[start : start + size]]
        with accelerator.autocast():
            logits = model(**collate(tokenizer, chosen, max_length, accelerator.device)).logits
        found.append(logits.argmax(-1))
    model.train()
    gathered = accelerator.gather(torch.cat(found)).view(world, -1).T.flatten()
    right: list[bool] = [
        names[int(i)] == label for i, (_, label) in zip(gathered, documents, strict=False)
    ]
    return sum(right) / len(right)


def save(path: Path, state: dict[str, Any]) -> None:
    """Whole or not at all: a job may be cut at any time."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Classify long documents with a patched encoder.")
    add = parser.add_argument
    add("--model", help="name or folder; default: all-MiniLM-L6-v2, of the extra `demo`")
    add("--data", type=Path, help='JSON Lines, {"text": ..., "label": ...}; default: libraries')
    add("--out", type=Path, default=Path("long-classifier"))
    add("--max-length", type=int, default=2048, help="tokens that are read")
    add("--block-size", type=int, default=128)
    add("--sparsity-type", default="norm")
    add("--max-steps", type=int, default=150)
    add("--batch-size", type=int, default=2, help="documents that a process reads at a time")
    add("--accumulate", type=int, default=4, help="batches of a process in a step")
    add("--lr", type=float, default=1e-4)
    add("--seed", type=int, default=0)
    add("--save-steps", type=int, default=25)
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    add("--fsdp", action="store_true", help="as `accelerate launch --use_fsdp` does, for torchrun")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    # All processes read the weights: by default accelerate leaves those of all but one empty.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    world = accelerator.num_processes
    sharded = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if sharded and world == 1:
        raise SystemExit("FSDP divides a model among processes, and there is one: start more")
    if accelerator.mixed_precision == "fp16":
        raise SystemExit(
            "--mixed_precision fp16 wants its losses scaled, which is not done: use bf16"
        )

    documents = read_documents(args.data) if args.data else library_documents()
    train, test = split(documents, 0.25, args.seed)
    name = args.model or bundled_model()
    model, tokenizer = load(name, sorted({label for _, label in documents}), args)
    model = distribute(model, accelerator, sharded)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)

    settings = {
        "model": str(name),
        "documents": [len(train), len(test)],
        "documents in a step": args.batch_size * args.accumulate * world,
    }
    for key in ("max_length", "block_size", "sparsity_type", "max_steps", "lr", "seed"):
        settings[key] = getattr(args, key)
    losses: list[float] = []
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        if not args.resume:
            raise SystemExit(f"{checkpoint} is there: --resume goes on from it; or another --out")
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if saved["settings"] != settings:
            raise SystemExit(f"{checkpoint} is of another run, {saved['settings']}, not {settings}")
        losses = saved["losses"]
        set_state_dict(
            model,
            optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
            options=FULL,
        )
    accelerator.print(
        f"{len(train)} documents to train on, {len(test)} to test with; {world} process(es) on "
        f"{accelerator.device.type}{', FSDP2' if sharded else ''}; from step {len(losses)}"
    )

    model.train()
    done, main_process = len(losses), accelerator.is_main_process
    bar = tqdm(range(done, args.max_steps), "training", disable=not main_process)
    for number in bar:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (number + 1) / 10) * (1 - number / args.max_steps)
        losses.append(step(model, tokenizer, train, number, args, accelerator))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=sum(losses[-10:]) / len(losses[-10:]))
        if (number + 1) % args.save_steps == 0 or number + 1 == args.max_steps:
            weights, moments = get_state_dict(model, optimizer, options=FULL)
            if main_process:
                args.out.mkdir(parents=True, exist_ok=True)
                state = {"model": weights, "optimizer": moments}
                save(checkpoint, {**state, "losses": losses, "settings": settings})

    results: dict[str, Any] = {"losses": losses}
    for length in sorted({min(512, args.max_length), args.max_length}):
        results[f"accuracy at {length}"] = accuracy(
            model, tokenizer, test, length, args.batch_size, accelerator
        )
        accelerator.print(f"accuracy, {length} tokens read: {results[f'accuracy at {length}']:.3f}")

    whole: dict[str, Any] = {**get_model_state_dict(model, options=FULL)}
    if main_process:
        folder = args.out / "model"
        accelerator.unwrap_model(model).save_pretrained(folder, state_dict=whole)
        tokenizer.save_pretrained(folder)
        (args.out / "results.json").write_text(json.dumps(results), encoding="utf-8")
        again = lsg_patch.from_pretrained(folder)  # patched, as it was saved
        assert all(torch.equal(whole[name], value) for name, value in again.state_dict().items())
        print(f"saved, and loaded back: lsg_patch.from_pretrained({str(folder)!r})")
    accelerator.end_training()


if __name__ == "__main__":
    main()
