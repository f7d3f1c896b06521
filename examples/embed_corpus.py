"""Embed a corpus of long texts with a patched encoder, to parquet, with as many workers as there are.

    python examples/embed_corpus.py --input texts/ --out embeddings --workers 2
    python examples/embed_corpus.py --input texts.jsonl --out embeddings --engine datasets

A worker loads the model once. It takes a shard of the corpus at a time and writes one file, whole or
not at all, with the columns `id`, `tokens` (how many were read) and `embedding`. Shards that are
there are left alone, so that a run that was cut is started again by the same command.

Workers write their files themselves: on a cluster `--out` is a folder that all machines see.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import pydoc
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer

import lsg_patch
from lsg_patch.demo import bundled_model

Shard = dict[str, Any]  # number, ids, texts


# The corpus


def library_texts() -> list[tuple[str, str]]:
    """The documentation of some modules of the standard library."""
    names = "argparse ast collections datetime decimal email.message http.client inspect logging "
    names += "mailbox pathlib pickle random smtplib socket ssl statistics subprocess tarfile typing"
    return [
        (name, pydoc.plain(pydoc.render_doc(importlib.import_module(name))))
        for name in names.split()
    ]


def read_corpus(path: Path) -> list[tuple[str, str]]:
    """Ids and texts: of a folder's *.txt files, or a .jsonl or .parquet file's `text` (and `id`)."""
    try:
        if path.is_dir():
            files = sorted(path.rglob("*.txt"))
            return [(str(f.relative_to(path)), f.read_text(encoding="utf-8")) for f in files]
        if path.suffix == ".parquet":
            rows = pyarrow.parquet.read_table(path).to_pylist()
        elif path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            rows = [json.loads(line) for line in lines if line.strip()]
        else:
            raise ValueError("neither a folder nor a .jsonl or .parquet file")
        for i, row in enumerate(rows):
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise ValueError(f"row {i} has no `text`")
        return [(str(row.get("id", i)), row["text"]) for i, row in enumerate(rows)]
    except (OSError, ValueError) as error:
        raise SystemExit(f"--input {path}: {error}") from None


def divide(corpus: list[tuple[str, str]], size: int) -> list[Shard]:
    parts = [corpus[start : start + size] for start in range(0, len(corpus), size)]
    return [
        {"number": number, "ids": [i for i, _ in part], "texts": [text for _, text in part]}
        for number, part in enumerate(parts)
    ]


def shard_file(out: str, number: int) -> Path:
    return Path(out, f"{number:06d}.parquet")


# A worker


class Embedder:
    """Mean of the tokens' outputs, normalised; one model for all shards of a worker."""

    def __init__(self, settings: dict[str, Any], device: str | None = None) -> None:
        name = settings["model"]
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.out, self.batch_tokens = settings["out"], settings["batch_tokens"]
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        with lsg_patch.auto_patching():  # a model that was saved patched
            self.model = AutoModel.from_pretrained(name).eval().to(self.device)
        if not lsg_patch.is_patched(self.model):
            lsg_patch.patch_model(
                self.model,
                tokenizer=self.tokenizer,
                max_position_embeddings=settings["max_length"],
                block_size=settings["block_size"],
                sparsity_type=settings["sparsity_type"],
            )
        limit = lsg_patch.get_config(self.model).max_position_embeddings
        self.max_length = min(settings["max_length"], limit)

    @torch.inference_mode()
    def embed(self, texts: list[str]) -> tuple[list[int], list[list[float]]]:
        """Numbers of tokens, and embeddings. Texts of like length are read together."""
        ids = self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        order = sorted(range(len(texts)), key=lambda i: len(ids[i]))
        found: dict[int, list[float]] = {}
        while order:
            chosen = order[-max(1, self.batch_tokens // len(ids[order[-1]])) :]
            del order[-len(chosen) :]
            rows = {"input_ids": [ids[i] for i in chosen]}
            inputs = self.tokenizer.pad(rows, return_tensors="pt").to(self.device)
            hidden = self.model(**inputs).last_hidden_state
            weights = inputs["attention_mask"].unsqueeze(-1)
            mean = (hidden * weights).sum(1) / weights.sum(1)
            normalised = torch.nn.functional.normalize(mean.float(), dim=-1)
            found.update(zip(chosen, normalised.tolist(), strict=True))
        return [len(row) for row in ids], [found[i] for i in range(len(texts))]

    def __call__(self, shard: Shard) -> dict[str, int]:
        """Embed a shard into its file."""
        tokens, embeddings = self.embed(list(shard["texts"]))
        columns = {
            "id": pyarrow.array(list(shard["ids"]), pyarrow.string()),
            "tokens": pyarrow.array(tokens, pyarrow.int32()),
            "embedding": pyarrow.array(embeddings, pyarrow.list_(pyarrow.float32())),
        }
        file = shard_file(self.out, shard["number"])
        partial = file.with_suffix(f".{os.getpid()}.partial")
        pyarrow.parquet.write_table(pyarrow.table(columns), partial)
        partial.replace(file)
        return {"written": len(tokens)}


# The engines


def with_loop(shards: list[Shard], settings: dict[str, Any], workers: int) -> None:
    """One process, no engine."""
    embedder = Embedder(settings)
    for shard in tqdm(shards, unit="shard"):
        embedder(shard)


def with_ray(shards: list[Shard], settings: dict[str, Any], workers: int) -> None:
    """On this machine, or on the cluster that `RAY_ADDRESS` names."""
    import ray

    # "local": what an earlier cluster left on this machine is not waited for
    address = os.environ.get("RAY_ADDRESS", "local")
    ray.init(address, ignore_reinit_error=True)
    gpus = ray.cluster_resources().get("GPU", 0)
    cpus = max(1, int(ray.cluster_resources()["CPU"]) // workers)
    # a row is a shard: an actor takes one at a time
    rows = ray.data.from_items(shards, override_num_blocks=len(shards))
    rows.map(
        Embedder,
        fn_constructor_args=(settings,),
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(shards))),
        num_cpus=0 if gpus else cpus,
        num_gpus=1 if gpus else 0,
    ).materialize()


@lru_cache(maxsize=1)
def process_embedder(settings: str, device: str | None) -> Embedder:
    """The one of this process."""
    torch.set_num_threads(max(1, torch.get_num_threads() // json.loads(settings)["workers"]))
    return Embedder(json.loads(settings), device)


def embed_in_process(shard: Shard, rank: int | None, settings: str) -> dict[str, int]:
    gpus = torch.cuda.device_count()
    device = f"cuda:{(rank or 0) % gpus}" if gpus else None
    return process_embedder(settings, device)(shard)


def with_datasets(shards: list[Shard], settings: dict[str, Any], workers: int) -> None:
    """`Dataset.map` with processes of this machine."""
    import datasets

    datasets.Dataset.from_list(shards).map(
        embed_in_process,
        with_rank=True,
        fn_kwargs={"settings": json.dumps({**settings, "workers": workers})},
        num_proc=min(workers, len(shards)),
        remove_columns=["number", "ids", "texts"],
        load_from_cache_file=False,
    )


ENGINES = {"ray": with_ray, "datasets": with_datasets, "loop": with_loop}


def check_settings(out: Path, settings: dict[str, Any], corpus: list[tuple[str, str]]) -> None:
    """Files of other texts or another model are not mixed with those of this run."""
    digest = hashlib.sha256(json.dumps(corpus).encode()).hexdigest()
    stated = {name: value for name, value in settings.items() if name != "out"}
    stated = {**stated, "corpus": digest}
    file = out / "settings.json"
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(stated), encoding="utf-8")
        partial.replace(file)
    elif json.loads(file.read_text(encoding="utf-8")) != stated:
        raise SystemExit(
            f"{out} holds embeddings of another corpus, model or setting: another --out"
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Embed a corpus of long texts, to parquet.")
    add = parser.add_argument
    add("--input", type=Path, help="folder of .txt, .jsonl or .parquet; default: some pydoc texts")
    add("--out", type=Path, default=Path("embeddings"))
    add("--model", help="name or folder; default: all-MiniLM-L6-v2, of the extra `demo`")
    add("--engine", choices=ENGINES, default="ray")
    add("--workers", type=int, default=2)
    add("--max-length", type=int, default=4096, help="tokens that are read")
    add("--block-size", type=int, default=128)
    add("--sparsity-type", default="norm")
    add("--shard-size", type=int, default=64, help="texts in a file")
    add("--batch-tokens", type=int, default=8192, help="tokens that a model reads at a time")
    args = parser.parse_args(argv)

    corpus = read_corpus(args.input) if args.input else library_texts()
    if not corpus:
        raise SystemExit(f"--input {args.input}: there is no text")
    model = args.model or bundled_model()
    try:
        AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--model {model}: {error}") from None
    settings = {
        "model": str(model),
        "out": str(args.out.absolute()),  # workers may have another working directory
        "max_length": args.max_length,
        "block_size": args.block_size,
        "sparsity_type": args.sparsity_type,
        "shard_size": args.shard_size,
        "batch_tokens": args.batch_tokens,
    }
    check_settings(args.out, settings, corpus)
    shards = divide(corpus, args.shard_size)
    missing = [s for s in shards if not shard_file(settings["out"], s["number"]).exists()]
    print(f"{len(corpus)} texts, {len(shards)} shards, {len(missing)} of them to be written")
    if missing:
        ENGINES[args.engine](missing, settings, args.workers)
    print(f"embeddings are in {args.out}")


if __name__ == "__main__":
    main()
