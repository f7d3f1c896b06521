"""Comparisons of what is made for serving: compiled by inductor, and run by onnxruntime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
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
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
NAMES = ["input_ids", "attention_mask", "token_type_ids"]


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
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        leave_out("onnx", f"{', '.join(missing)} is not installed (pip install lsg-patch[onnx])")
        return
    base = bert(options.layers, max(options.lengths))
    models: dict[str, Any] = {"full": base}
    models |= {name: patched_copy(base, name) for name in options.selections}
    runtime: Any = import_module("onnxruntime")
    sessions: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            for kind, file in _files(model, Path(folder, name)).items():
                sessions[f"{name}, {kind}"] = runtime.InferenceSession(str(file))
    for length in options.lengths:
        for size in BATCHES:
            batch = padded([inputs(length)] * size)
            batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
            feed = {name: batch[name].numpy() for name in NAMES}
            calls = {name: partial(x.run, None, feed) for name, x in sessions.items()}
            yield from _each_kind("onnx", f"{size} of {length} tokens", calls, options)


def _each_kind(
    comparison: str, case: str, calls: Mapping[str, Callable[[], object]], options: Options
) -> Iterator[list[Record]]:
    """Records of sides in two kinds, in turn: each to the first of its kind, all from one run."""
    sides = [Side(name, call) for name, call in calls.items()]
    seconds = time_sides(sides, options.rounds, options.clock)
    for kind in (0, 1):
        of_kind = f"{case}, to {sides[kind].name}"
        yield records_of(comparison, of_kind, sides[kind::2], seconds[kind::2], bar)


def _files(model: torch.nn.Module, place: Path) -> dict[str, Path]:
    """An ONNX file in float32 and one in int8."""
    files = {kind: place.with_suffix(f".{kind}.onnx") for kind in ("float32", "int8")}
    mask = torch.ones(2, 400, dtype=torch.long)
    config: Any = model.config
    exporting.write(
        exporting.Outputs(model),
        str(files["float32"]),
        (7 * mask, mask, 0 * mask),
        NAMES,
        config.max_position_embeddings,
    )
    exporting.quantize(str(files["float32"]), str(files["int8"]))
    return files
