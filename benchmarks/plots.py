"""Plots of written results: `python -m benchmarks plots --json benchmarks/results/cpu.json`."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.models import SELECTIONS
from benchmarks.store import read
from lsg_patch.attention import Geometry

# (comparison, name of the file, label of the vertical axis)
AGAINST_LENGTH = (
    ("forward", "forward", "milliseconds a forward"),
    ("peers", "peers-time", "milliseconds a forward"),
    ("peers' memory", "peers-memory", "MiB at the peak of a forward"),
)


def draw(results: Path) -> list[Path]:
    """Draws what the results hold, next to them; the paths of the plots."""
    records = read(results)
    paths = []
    for comparison, name, label in AGAINST_LENGTH:
        lines = _lines(records, comparison, lambda record: record["value"]["median"])
        if lines:
            path = results.with_name(f"{results.stem}-{name}.png")
            paths.append(_plot(lines, label, path, is_log=True))
    lines = _lines(records, "attention", lambda record: record["ratio"]["median"])
    lines = {
        name: [(length, floor(length, name) / ratio) for length, ratio in points]
        for name, points in lines.items()
        if name not in ("full (sdpa)", "local-attention")
    }
    if lines:
        path = results.with_name(f"{results.stem}-floor.png")
        paths.append(_plot(lines, "share of the floor by key count", path, is_log=False))
    return paths


def floor(length: int, sparsity_type: str) -> float:
    """Keys that a query sees at the defaults, of all keys: what no implementation is faster than."""
    geometry = Geometry(128, 0 if sparsity_type == "none" else 128, 2)
    if length <= geometry.full_length:
        return 1.0
    runs = geometry.runs(
        range(length), range(geometry.num_blocks(length) * geometry.sparse_per_block)
    )
    pairs = sum(
        run.num_blocks * run.num_queries * (1 + run.local.size + sum(w.size for w in run.sparse))
        for run in runs
    )
    return pairs / length**2


def _lines(records: list[Any], comparison: str, value: Any) -> dict[str, list[tuple[int, float]]]:
    lines = defaultdict(list)
    for record in records:
        if record["comparison"] == comparison:
            lines[record["side"]].append((int(record["case"].split()[0]), value(record)))
    return {name: sorted(points) for name, points in lines.items()}


def _plot(lines: dict[str, list[tuple[int, float]]], label: str, path: Path, is_log: bool) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = plt.subplots(figsize=(7, 4))
    for name, points in lines.items():
        is_ours = name in SELECTIONS
        axes.plot(
            *zip(*points, strict=True),
            marker="o",
            markersize=3,
            linewidth=2 if is_ours else 1,
            linestyle="-" if is_ours else "--",
            label=f"LSG, {name}" if is_ours else name,
        )
    axes.set_xscale("log", base=2)
    lengths = sorted({length for points in lines.values() for length, _ in points})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    if is_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)
    return path
