"""Results in a file: what is measured again replaces what was there, all else stays."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.harness import Record


def conditions(layers: int) -> dict[str, Any]:
    """What the numbers depend on, apart from the code."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return gpu | {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "layers": layers,
    }


def merge(path: Path, records: Sequence[Record], conditions: dict[str, Any]) -> None:
    """Writes records, each under the conditions that it was measured in, with those of ``path``.

    A case of a comparison is replaced as a whole: its ratios are to its own reference.
    """
    new = {(r.comparison, r.case) for r in records}
    runs = _runs(path) if path.exists() else []
    for run in runs:
        run["records"] = [r for r in run["records"] if (r["comparison"], r["case"]) not in new]
    if all(run["conditions"] != conditions for run in runs):
        runs.append({"conditions": conditions, "records": []})
    for run in runs:
        if run["conditions"] == conditions:
            run["records"] += [asdict(r) | {"missed": r.missed} for r in records]
    kept = {"runs": [run for run in runs if run["records"]]}
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a file, whatever they were measured in."""
    return [record for run in _runs(path) for record in run["records"]]


def _runs(path: Path) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["runs"]
    return runs
