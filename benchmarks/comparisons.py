"""The comparisons. A new one is a function here and an entry in `COMPARISONS`; a peer is a `Side`."""

from __future__ import annotations

import copy
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
from benchmarks.harness import Options, Record, Rounds, Side, Spread, records_of, time_sides
from benchmarks.models import SELECTIONS, bert, inputs, padded, patched_copy, run
from benchmarks.peers import available, leave_out, local_attention, sentence_transformer, texts_of
from benchmarks.serving import compiled, onnx
from lsg_patch import lsg_attention, patch_model, unpatch_model
from lsg_patch.memory import peak_memory


def _peak(model: torch.nn.Module, batch: dict[str, Any]) -> float:
    """MiB that a forward needs at its peak, beyond weights and input."""
    with peak_memory() as used:
        run(model, batch)
    return used.peak_bytes / 2**20


def forward(options: Options) -> Iterator[list[Record]]:
    """Time of one forward: full attention against each selection, length by length."""
    base = bert(options.layers, max(options.lengths))
    models = {"full (sdpa)": base} | {s: patched_copy(base, s) for s in options.selections}
    for length in options.lengths:
        batch = inputs(length)
        sides = [Side(name, partial(run, model, batch)) for name, model in models.items()]
        seconds = time_sides(sides, options.rounds, options.clock)
        yield records_of("forward", f"{length} tokens", sides, seconds, bar)


def memory(options: Options) -> Iterator[list[Record]]:
    """Peak memory of one forward, and how it grows from the shortest length to the longest."""
    short, long = min(options.lengths), max(options.lengths)
    base = bert(options.layers, long)
    case, records = f"{short} to {long} tokens", []
    for selection in options.selections:
        model = patched_copy(base, selection)
        least, most = (_peak(model, inputs(length)) for length in (short, long))
        records.append(_single("memory", case, selection, most / least, [most], "MiB"))
    yield records


def growth(options: Options) -> Iterator[list[Record]]:
    """Time and peak memory per token: the longest length against the shortest.

    As many tokens on both sides: a long text against as many short ones, one after another.
    """
    short, long = min(options.lengths), max(options.lengths)
    base = bert(options.layers, long)
    for selection in options.selections:
        model = patched_copy(base, selection)
        many, one = [inputs(short)] * (long // short), inputs(long)
        sides = [
            Side(f"{len(many)} of {short}", partial(run, model, *many)),
            Side(f"1 of {long}", partial(run, model, one)),
        ]
        case = f"{short} to {long} tokens, {selection}"
        seconds = time_sides(sides, options.rounds, options.clock)
        yield records_of("growth", f"{case}, time", sides, seconds, bar)
        peaks = [_peak(model, many[0]), _peak(model, one)]
        shares = [1.0, peaks[1] / peaks[0] * short / long]
        case = f"{case}, memory"
        yield [
            _single("growth", case, name, share, [peak], "MiB")
            for name, share, peak in zip(
                (f"1 of {short}", sides[1].name), shares, peaks, strict=True
            )
        ]


def ragged(options: Options) -> Iterator[list[Record]]:
    """Time of a padded batch of 8 unequal texts, by default and padded, against each text alone."""
    short, long = min(options.lengths), max(options.lengths)
    texts = [inputs(short + (long - short) * i // 7) for i in range(8)]
    base = bert(options.layers, long)
    for selection in options.selections:
        model = patched_copy(base, selection)
        batch = padded(texts)
        sides = [
            Side("one by one", partial(run, model, *texts)),
            Side("by default", partial(run, model, batch)),
            Side("unpad=False", partial(run, patched_copy(base, selection, unpad=False), batch)),
        ]
        seconds = time_sides(sides, options.rounds, options.clock)
        case = f"8 of {short} to {long} tokens, {selection}"
        yield records_of("ragged", case, sides, seconds, bar)


@torch.inference_mode()
def attention(options: Options) -> Iterator[list[Record]]:
    """Time of the attention product alone, 12 heads of 64, against full fused attention."""
    local = local_attention(128)
    for length in options.lengths:
        drawn = torch.randn(3, 1, length + 1, 12, 64)
        query, key, value = drawn.transpose(2, 3)
        sides = [Side("full (sdpa)", partial(F.scaled_dot_product_attention, query, key, value))]
        lsg = partial(lsg_attention, query, key, value, num_global_tokens=1, backend="sdpa")
        sides += [Side(name, partial(lsg, sparsity_type=name)) for name in options.selections]
        if local is not None:
            sides.append(Side("local-attention", partial(local, query, key, value)))
        seconds = time_sides(sides, options.rounds, options.clock)
        yield records_of("attention", f"{length} tokens", sides, seconds, bar)


def _train(model: torch.nn.Module, batch: dict[str, Any]) -> None:
    model.zero_grad()
    model(**batch)[0].square().mean().backward()


def train(options: Options) -> Iterator[list[Record]]:
    """Time of a training step with attention dropout, against each of its references."""
    for length in options.lengths:
        base = bert(options.layers, length)
        others = {
            name: make(options.layers, length)
            for name, make in available("BigBird", "Longformer").items()
        }
        models = {"full (sdpa)": base} | others
        models |= {name: patched_copy(base, name) for name in options.selections}
        batch = inputs(length)
        sides = [
            Side(name, partial(_train, model.train(), batch)) for name, model in models.items()
        ]
        seconds = time_sides(sides, options.rounds, options.clock)
        ours = range(1 + len(others), len(sides))
        for reference in range(1 + len(others)):
            shown = (reference, *ours)
            case = f"{length} tokens, to {sides[reference].name}"
            times = [seconds[i] for i in shown]
            yield records_of("train", case, [sides[i] for i in shown], times, bar)


def peers(options: Options) -> Iterator[list[Record]]:
    """Time and peak memory of one forward: full attention against other models, and ours."""
    others = available()
    for length in options.lengths:
        base = bert(options.layers, length)
        models: dict[str, torch.nn.Module] = {"full (sdpa)": base}
        models |= {name: patched_copy(base, name) for name in options.selections}
        models |= {name: make(options.layers, length) for name, make in others.items()}
        batch, case = inputs(length), f"{length} tokens"
        sides = [Side(name, partial(run, model, batch)) for name, model in models.items()]
        seconds = time_sides(sides, options.rounds, options.clock)
        yield records_of("peers", case, sides, seconds, bar)
        peaks = {name: _peak(model, batch) for name, model in models.items()}
        yield [
            _single("peers' memory", case, name, peak / peaks["full (sdpa)"], [peak], "MiB")
            for name, peak in peaks.items()
        ]


NUM_TEXTS, BATCH_SIZES = 256, (8, 32, 128)


def batches(options: Options) -> Iterator[list[Record]]:
    """Time of SentenceTransformer.encode on texts as a corpus has them, against the unpatched model.

    256 texts, which the unpatched model truncates at its 512 tokens; weights of all-MiniLM-L6-v2.
    """
    base = sentence_transformer(options.layers)
    if base is None:
        return
    short, long = min(options.lengths), max(options.lengths)
    texts = texts_of(base, NUM_TEXTS, short, long)
    models = {"unpatched": base}
    for name in options.selections:
        models[name] = patch_model(copy.deepcopy(base), sparsity_type=name)
    for size in BATCH_SIZES:
        sides = [
            Side(name, partial(model.encode, texts, batch_size=size, show_progress_bar=False))
            for name, model in models.items()
        ]
        seconds = time_sides(sides, options.rounds, options.clock)
        case = f"{short} to {long} tokens, {size} texts at a time"
        yield records_of("batches", case, sides, seconds, bar)


IMPORT = """
import time
import transformers
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


def regression(options: Options) -> Iterator[list[Record]]:
    """What continuous integration holds to: one thread, its own seconds, the fastest runs.

    Seconds of the process and the least of them are what other work on the machine disturbs least.
    A forward at the first length, the product alone at the second, memory from the first to the last.
    """
    first, second, last = options.lengths
    options = replace(options, clock=time.process_time)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        parts = (
            forward(replace(options, lengths=(first,))),
            attention(replace(options, lengths=(second,))),
            memory(replace(options, lengths=(first, last))),
        )
        for part in parts:
            for found in part:
                yield [_for_regression(record) for record in found]
    finally:
        torch.set_num_threads(threads)


def _for_regression(record: Record) -> Record:
    case = f"{record.comparison}, {record.case}"
    held_to = bar("regression", case, record.side)
    return replace(record, comparison="regression", case=case, bar=held_to, is_best_held=True)


GPU = torch.device("cuda")


def gpu(options: Options) -> Iterator[list[Record]]:
    """Time and peak memory on a GPU, in bfloat16: a forward and a training step, against full attention."""
    if not _is_there(GPU):
        leave_out("gpu", f"there is no {GPU} device")
        return
    for length in options.lengths:
        base = bert(options.layers, length).to(GPU, torch.bfloat16)
        models = {"full (sdpa)": base} | {s: patched_copy(base, s) for s in options.selections}
        batch = {name: x.to(GPU) for name, x in inputs(length).items()}
        for what, step, trains in (("forward", run, False), ("training step", _train, True)):
            case = f"{length} tokens, {what}"
            sides = [
                Side(name, partial(_finished, step, model.train(trains), batch))
                for name, model in models.items()
            ]
            seconds = time_sides(sides, options.rounds, options.clock)
            yield records_of("gpu", case, sides, seconds, bar)
            peaks = {side.name: _peak_on_device(side.call) for side in sides}
            yield [
                _single("gpu", f"{case}, memory", name, peak / peaks["full (sdpa)"], [peak], "MiB")
                for name, peak in peaks.items()
            ]


def _is_there(device: torch.device) -> bool:
    return device.type == "cpu" or torch.cuda.is_available()


def _finished(step: Callable[..., None], *args: Any) -> None:
    """Calls, and waits until the device is done with it."""
    step(*args)
    if GPU.type == "cuda":
        torch.cuda.synchronize()


def _peak_on_device(call: Callable[[], object]) -> float:
    """MiB that a call needs at its peak, beyond what is there before, by the device's own count."""
    if GPU.type == "cpu":
        with peak_memory() as used:
            call()
        return used.peak_bytes / 2**20
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


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


@dataclass(frozen=True)
class Comparison:
    """A comparison, and what it measures where nothing else is asked for."""

    run: Callable[[Options], Iterator[list[Record]]]  # a case at a time, with all its sides
    minutes: float  # that it takes so, about, on 2 cores
    lengths: tuple[int, ...] = ()
    selections: tuple[str, ...] = ("norm",)
    rounds: Rounds = field(default_factory=Rounds)
    layers: int = 2

    @property
    def summary(self) -> str:
        return (self.run.__doc__ or "").partition("\n")[0]


FEW = Rounds(least=3)  # of rounds that take long
COMPARISONS = {
    "forward": Comparison(forward, 1.8, (128, 512, 1024, 4096), SELECTIONS),
    "long": Comparison(forward, 7, (8192, 16384), SELECTIONS),
    "attention": Comparison(attention, 0.7, (128, 1024, 4096), SELECTIONS),
    "memory": Comparison(memory, 0.7, (8192, 32768)),
    "ragged": Comparison(ragged, 1.5, (200, 4096), rounds=FEW),
    "batches": Comparison(batches, 6, (64, 512), rounds=FEW, layers=6),
    "long-batches": Comparison(batches, 12, (256, 4096), rounds=Rounds(least=1), layers=6),
    "small": Comparison(small, 0.3, (), ()),
    "train": Comparison(train, 2, (4096,), rounds=FEW),
    "growth": Comparison(growth, 5, (8192, 65536), rounds=FEW),
    "compile": Comparison(compiled, 8, (512, 1024, 4096, 8192), rounds=FEW),
    "onnx": Comparison(onnx, 8, (512, 2048, 4096), rounds=FEW),
    "peers": Comparison(peers, 4, (512, 1024, 2048, 4096), rounds=FEW),
    "gpu": Comparison(gpu, 5, (4096, 16384, 65536), layers=12),
    "regression": Comparison(
        regression, 0.7, (1024, 4096, 8192), ("norm", "none"), Rounds(seconds=5)
    ),
}
# what is run where nothing is named: 5 minutes
QUICK = ("forward", "attention", "memory", "ragged", "small")
