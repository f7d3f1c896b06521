"""Comparisons of what is made for serving: compiled by inductor, and run by onnxruntime."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.bars import bar
from benchmarks.harness import Options, Record, Side, records_of, time_sides
from benchmarks.models import bert, inputs, padded, patched_copy, run
from benchmarks.peers import leave_out
from lsg_patch import exporting

BACKEND = "inductor"  # needs a C++ compiler
BATCHES = (1, 8)


def compiled(options: Options) -> Iterator[list[Record]]:
    """Time of one forward, compiled by inductor for all lengths and eager, against unpatched ones."""
    base = bert(options.layers, max(options.lengths))
    eager = {"full (sdpa)": base} | {s: patched_copy(base, s) for s in options.selections}
    models: dict[str, Any] = {}
    for name, model in eager.items():
        models[name] = model
        models[f"{name}, compiled"] = torch.compile(model, dynamic=True, backend=BACKEND)
    for length in options.lengths:
        calls = {name: partial(run, model, inputs(length)) for name, model in models.items()}
        yield from _each_kind("compile", f"{length} tokens", calls, options)


def onnx(options: Options) -> Iterator[list[Record]]:
    """Time of one forward in onnxruntime, in float32 and int8, against the unpatched model's."""
    missing = [name for name in exporting.PACKAGES if find_spec(name) is None]
    if missing:
        leave_out("onnx", f"{', '.join(missing)} is not installed (pip install lsg-patch[onnx])")
        return
    base = bert(options.layers, max(options.lengths))
    models: dict[str, Any] = {"full": base}
    models |= {name: patched_copy(base, name) for name in options.selections}
    runs: dict[str, exporting.Run] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            for kind, file in _files(model, Path(folder, name), min(options.lengths)).items():
                runs[f"{name}, {kind}"] = exporting.opened(file)
    for length in options.lengths:
        for size in BATCHES:
            # full attention's scores, with the mask and after the softmax, in float32
            needed = 3 * 4 * size * base.config.num_attention_heads * length**2
            if 2 * needed > _free_bytes():
                reason = f"{needed / 2**30:.1f} GiB of scores are over half of the free memory"
                leave_out(f"onnx, {size} of {length} tokens", reason)
                continue
            batch = padded([inputs(length)] * size)
            batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
            calls = {name: partial(of_file, batch) for name, of_file in runs.items()}
            yield from _each_kind("onnx", f"{size} of {length} tokens", calls, options)


def _free_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _each_kind(
    comparison: str, case: str, calls: Mapping[str, Callable[[], object]], options: Options
) -> Iterator[list[Record]]:
    """Records of sides in two kinds, in turn: each to the first of its kind, all from one run."""
    sides = [Side(name, call) for name, call in calls.items()]
    seconds = time_sides(sides, options.rounds, options.clock)
    for kind in (0, 1):
        of_kind = f"{case}, to {sides[kind].name}"
        yield records_of(comparison, of_kind, sides[kind::2], seconds[kind::2], bar)


def _files(model: torch.nn.Module, place: Path, length: int) -> dict[str, Path]:
    """An ONNX file in float32, by an example of ``length`` tokens, and one in int8."""
    files = {kind: place.with_suffix(f".{kind}.onnx") for kind in ("float32", "int8")}
    exporting.Program(model).write(files["float32"], length)
    exporting.quantize(files["float32"], files["int8"])
    return files
