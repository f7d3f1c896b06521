"""The comparisons. A new one is a function here and a line in `COMPARISONS`; a peer is a `Side`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.bars import bar
from benchmarks.harness import Record, Rounds, Side, Spread, records_of, time_sides
from benchmarks.models import SELECTIONS, bert, inputs, patched_copy
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
        yield [
            Record(
                comparison="memory",
                case=case,
                side=selection,
                ratio=Spread.of([growth]),
                best=growth,
                value=Spread.of([peak]),
                unit="MiB",
                samples=1,
                bar=bar("memory", case, selection),
            )
        ]


COMPARISONS: dict[str, Callable[[Options], Iterator[list[Record]]]] = {
    "forward": forward,
    "memory": memory,
}
