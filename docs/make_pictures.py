"""The pictures of README and documentation: `python docs/make_pictures.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from lsg_patch import LSGConfig, plot_cost, plot_pattern
from lsg_patch.attention import SPARSITY_TYPES
from lsg_patch.attention.geometry import Geometry

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "pictures"
FACTORS = {"lsh": 4, "none": 1}


def patterns() -> None:
    """The seven selections side by side, of one head over random keys."""
    figure, axes = plt.subplots(2, 4, figsize=(12, 6.4), layout="constrained")
    panels = list(axes.flat)
    for name, panel in zip(SPARSITY_TYPES, panels, strict=False):
        config = LSGConfig(
            block_size=8,
            sparse_block_size=8,
            sparsity_factor=FACTORS.get(name, 2),
            sparsity_type=name,
            num_global_tokens=2,
        )
        plot_pattern(config, 80, head=1, axes=panel)
        panel.set(xticks=[], yticks=[], xlabel="", ylabel="")
        legend = panel.get_legend()
        handles, labels = legend.legend_handles, [text.get_text() for text in legend.texts]
        legend.remove()
        if name == "norm":
            panels[-1].axis("off")
            panels[-1].legend(handles, labels, loc="center", fontsize=14, frameon=False)
            panels[-1].set_title("queries downwards,\nkeys to the right", fontsize=13, y=0.05)
    figure.savefig(PICTURES / "patterns.png", dpi=110)


def cost() -> None:
    """What a head computes, against the length."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    plot_cost(LSGConfig(), [2**n for n in range(8, 17)], axes=axes)
    figure.savefig(PICTURES / "cost.png", dpi=110)


def quality() -> None:
    """MRR of source B by one vector and by many, of `benchmarks/results/quality.json`."""
    found = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text("utf-8"))
    rows = [row for row in found["rows"] if row["queries"] == "passage"]
    figure, axes = plt.subplots(2, 2, figsize=(13, 8), layout="constrained")
    for number, panel in zip((1, 8, 16, 32), axes.flat, strict=True):
        own = [row for row in rows if row["vectors"] == number]
        for place, row in enumerate(own):
            middle, low, high = row["B"]
            is_ours = "chunks" not in row["reading"] and "full" not in row["reading"]
            colour = "#4c72b0" if is_ours else "#bdbdbd"
            panel.barh(place, middle, xerr=[[middle - low], [high - middle]], color=colour)
        panel.set_title(f"{number} vector{'s' * (number > 1)} a document", fontsize=13)
        panel.set_yticks(range(len(own)), [row["reading"] for row in own], fontsize=12)
        panel.set(xlim=(0.4, 1.0), xlabel="MRR, with 95% intervals")
        panel.invert_yaxis()
    figure.savefig(PICTURES / "quality.png", dpi=110)


# what there is between two steps, and the step that follows: its name, and what it does
WAY = (
    ("input_ids, attention_mask (B, T0)", "embeddings", "the model's own, with more positions"),
    (
        "hidden states (B, T0, width)",
        "enter the stack",
        "global tokens first; padding to the right,\nor the real tokens of all rows packed",
    ),
    (
        "hidden states (B, g + T, width), layout",
        "layers 1 ... N",
        "the model's own but for LSG attention:\nglobal rows see all keys, token rows\n"
        "their local, sparse and global ones",
    ),
    (
        "hidden states (B, g + T, width)",
        "leave the stack",
        "each token's row back to its place;\nthe first global token's to the first one",
    ),
    ("last_hidden_state (B, T0, width)", "", ""),
)


def way() -> None:
    """The way of a tensor through a patched model."""
    figure, axes = plt.subplots(figsize=(9, 5.4), layout="constrained")
    axes.set(xlim=(0, 10), ylim=(-len(WAY) + 0.6, 0.4))
    axes.axis("off")
    box = {"boxstyle": "round,pad=0.5", "facecolor": "#eef2fa", "edgecolor": "#4c72b0"}
    for place, (tensor, step, what) in enumerate(WAY):
        axes.text(2.6, -place, tensor, ha="center", va="center", fontsize=12, bbox=box)
        if step:
            ends = {"xy": (2.6, -place - 0.76), "xytext": (2.6, -place - 0.24)}
            axes.annotate("", **ends, arrowprops={"arrowstyle": "-|>", "color": "#444444"})
            axes.text(2.8, -place - 0.5, step, va="center", fontsize=12, fontweight="bold")
            axes.text(5.3, -place - 0.5, what, va="center", fontsize=12)
    figure.savefig(PICTURES / "way.png", dpi=110)


def windows() -> None:
    """What one block sees of a sequence, and which blocks are computed together."""
    geometry, length, block = Geometry(4, 4, 2), 34, 3
    runs = geometry.runs(range(length), range(length // 2))
    [run] = [r for r in runs if r.first_block <= block < r.first_block + r.num_blocks]
    figure, axes = plt.subplots(figsize=(12, 3.6), layout="constrained")
    axes.set(xlim=(-8.5, length + 0.5), ylim=(-5.6, 0.8))
    axes.axis("off")
    blue, orange, grey = "#4c72b0", "#dd8452", "#eeeeee"

    def row(place: int, name: str, parts: Sequence[tuple[float, float, str, str]]) -> None:
        """Parts of the sequence: from, to, colour and what is written there."""
        axes.text(-0.6, -place, name, ha="right", va="center", fontsize=13)
        for start, stop, colour, label in parts:
            size = {"width": stop - start, "left": start, "height": 0.62, "edgecolor": "white"}
            axes.barh(-place, color=colour, **size)
            colour = "black" if colour == grey else "white"
            middle = (start + stop) / 2
            axes.text(middle, -place, label, ha="center", va="center", color=colour, fontsize=11)

    count, factor = geometry.num_blocks(length), geometry.sparsity_factor
    size = geometry.block_size
    ends = [(i, i * size, min(length, (i + 1) * size)) for i in range(count)]
    row(0, "tokens", [(i, i + 1, grey, "") for i in range(length)])
    row(1, "blocks", [(a, b, blue if i == block else grey, str(i)) for i, a, b in ends])
    start = run.local.start + block * run.local.stride
    row(
        2,
        "local window",
        [(start, start + run.local.size, blue, "its own block and its neighbours")],
    )
    sparse = [(i * factor, (i + 1) * factor, grey, "") for i in range(length // factor)]
    seen = [(w.start + block * w.stride, w.start + block * w.stride + w.size) for w in run.sparse]
    sparse += [(a * factor, b * factor, orange, f"{b - a} sparse tokens") for a, b in seen]
    row(3, "sparse windows", sparse)
    spans = [
        (r.first_block * size, min(length, (r.first_block + r.num_blocks) * size)) for r in runs
    ]
    row(4, "runs", [(a, b, grey, str(i)) for i, (a, b) in enumerate(spans)])
    own = (run.first_block * size, (run.first_block + run.num_blocks) * size)
    row(5, "a piece", [(*own, blue, "some rows, heads")])
    figure.savefig(PICTURES / "windows.png", dpi=110)


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    way()
    windows()
    patterns()
    cost()
    quality()
