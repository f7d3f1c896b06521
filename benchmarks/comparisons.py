"""The comparisons. A new one is a function here and a line in `COMPARISONS`; a peer is a `Side`."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.bars import BUDGETS, bar
from benchmarks.harness import Record, Rounds, Side, Spread, records_of, time_sides
from benchmarks.models import SELECTIONS, bert, inputs, patched_copy
from benchmarks.peers import PEERS, local_attention
from lsg_patch import lsg_attention, patch_model, unpatch_model
from lsg_patch.memory import peak_memory

MEMORY_LENGTHS = (8192, 32768)


@dataclass(frozen=True)
class Options:
    lengths: tuple[int, ...] = (128, 1024, 4096)
    selections: tuple[str, ...] = SELECTIONS
    memory_selections: tuple[str, ...] = ("norm",)
    layers: int = 2
    rounds: Rounds = field(default_factory=Rounds)


@torch.inference_mode()
def _run(model: torch.nn.Module, batch: dict[str, Any]) -> None:
    model(**batch)


def forward(options: Options) -> Iterator[list[Record]]:
    """Time of one forward: full attention against each selection, length by length."""
    base = bert(options.layers, max(options.lengths))
    models = {"full (sdpa)": base} | {s: patched_copy(base, s) for s in options.selections}
    for length in options.lengths:
        batch = inputs(length)
        sides = [Side(name, partial(_run, model, batch)) for name, model in models.items()]
        seconds = time_sides(sides, options.rounds)
        yield records_of("forward", f"{length} tokens", sides, seconds, bar)


def memory(options: Options) -> Iterator[list[Record]]:
    """Peak memory of one forward, and how it grows when the input is four times as long."""
    short, long = MEMORY_LENGTHS
    base = bert(options.layers, long)
    for selection in options.memory_selections:
        model = patched_copy(base, selection)
        peaks = []
        for length in (short, long):
            with peak_memory() as used:
                _run(model, inputs(length))
            peaks.append(used.peak_bytes)
        growth, peak = peaks[1] / peaks[0], peaks[1] / 2**20
        case = f"{short} to {long} tokens"
        yield [_single("memory", case, selection, growth, [peak], "MiB")]


@torch.inference_mode()
def attention(options: Options) -> Iterator[list[Record]]:
    """Time of the attention product alone, 12 heads of 64, against full fused attention."""
    for length in options.lengths:
        drawn = torch.randn(3, 1, length + 1, 12, 64)
        query, key, value = drawn.transpose(2, 3)
        sides = [Side("full (sdpa)", partial(F.scaled_dot_product_attention, query, key, value))]
        lsg = partial(lsg_attention, query, key, value, num_global_tokens=1, backend="sdpa")
        sides += [Side(name, partial(lsg, sparsity_type=name)) for name in options.selections]
        local = local_attention(128)
        if local is not None:
            sides.append(Side("local-attention", partial(local, query, key, value)))
        seconds = time_sides(sides, options.rounds)
        yield records_of("attention", f"{length} tokens", sides, seconds, bar)


def _train(model: torch.nn.Module, batch: dict[str, Any]) -> None:
    model.zero_grad()
    model(**batch)[0].square().mean().backward()


def train(options: Options) -> Iterator[list[Record]]:
    """Time of a training step with attention dropout, against each of its references."""
    length = max(options.lengths)
    base = bert(options.layers, length)
    peers = {name: PEERS[name](options.layers, length) for name in ("BigBird", "Longformer")}
    models = {"full (sdpa)": base} | peers
    models |= {name: patched_copy(base, name) for name in options.memory_selections}
    batch = inputs(length)
    sides = [Side(name, partial(_train, model.train(), batch)) for name, model in models.items()]
    seconds = time_sides(sides, replace(options.rounds, least=min(3, options.rounds.least)))
    ours = range(1 + len(peers), len(sides))
    for reference in range(1 + len(peers)):
        shown = (reference, *ours)
        case = f"{length} tokens, to {sides[reference].name}"
        yield records_of("train", case, [sides[i] for i in shown], [seconds[i] for i in shown], bar)


def peers(options: Options) -> Iterator[list[Record]]:
    """Time and peak memory of one forward: full attention against norm and every other model."""
    for length in options.lengths:
        base = bert(options.layers, length)
        models: dict[str, torch.nn.Module] = {"full (sdpa)": base}
        models["norm"] = patched_copy(base, "norm")
        models |= {name: make(options.layers, length) for name, make in PEERS.items()}
        batch, case = inputs(length), f"{length} tokens"
        sides = [Side(name, partial(_run, model, batch)) for name, model in models.items()]
        yield records_of("peers", case, sides, time_sides(sides, options.rounds), bar)
        peaks = []
        for side in sides:
            with peak_memory() as used:
                side.call()
            peaks.append(used.peak_bytes / 2**20)
        yield [
            _single("peers' memory", case, side.name, peak / peaks[0], [peak], "MiB")
            for side, peak in zip(sides, peaks, strict=True)
        ]


IMPORT = """
import time
import torch, transformers
start = time.perf_counter()
import lsg_patch
print(time.perf_counter() - start)
"""


def small(options: Options) -> Iterator[list[Record]]:
    """What a patch, its reversal and the import cost; the ratio is to what each may cost."""
    model = bert(12, 512)
    found: dict[str, list[float]] = {name: [] for name in BUDGETS}
    for _ in range(options.rounds.least):
        start = time.perf_counter()
        patch_model(model)
        patched = time.perf_counter()
        unpatch_model(model)
        found["patch_model"].append(1e3 * (patched - start))
        found["unpatch_model"].append(1e3 * (time.perf_counter() - patched))
        said = subprocess.run([sys.executable, "-c", IMPORT], check=True, capture_output=True)
        found["import"].append(1e3 * float(said.stdout))
    yield [
        _single("small", "BERT-base", name, Spread.of(times).median / BUDGETS[name], times, "ms")
        for name, times in found.items()
    ]


def _single(
    comparison: str, case: str, side: str, ratio: float, values: Sequence[float], unit: str
) -> Record:
    return Record(
        comparison=comparison,
        case=case,
        side=side,
        ratio=Spread.of([ratio]),
        best=ratio * min(values) / Spread.of(values).median,
        value=Spread.of(values),
        unit=unit,
        samples=len(values),
        bar=bar(comparison, case, side),
    )


COMPARISONS: dict[str, Callable[[Options], Iterator[list[Record]]]] = {
    "forward": forward,
    "memory": memory,
    "attention": attention,
    "train": train,
    "small": small,
    "peers": peers,
}
# what is run where nothing is named: minutes
QUICK = ("forward", "memory", "attention", "train", "small")
