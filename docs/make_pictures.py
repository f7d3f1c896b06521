"""The pictures of README and documentation: `python docs/make_pictures.py`."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from lsg_patch import LSGConfig, plot_cost, plot_pattern
from lsg_patch.attention import SPARSITY_TYPES

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
            panels[-1].set_title("queries downwards, keys to the right", fontsize=10, y=0.15)
    figure.savefig(PICTURES / "patterns.png", dpi=110)


def cost() -> None:
    """What a head computes, against the length."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    plot_cost(LSGConfig(), [2**n for n in range(8, 17)], axes=axes)
    figure.savefig(PICTURES / "cost.png", dpi=110)


def quality() -> None:
    """MRR of source B by one vector and by many, of `benchmarks/results/quality.json`."""
    found = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text("utf-8"))
    rows = [row for row in found["rows"] if row["queries"] == "passage" and row["vectors"] < 32]
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained", sharey=True)
    for number, panel in zip((1, 8, 16), axes, strict=True):
        own = [row for row in rows if row["vectors"] == number]
        for place, row in enumerate(own):
            middle, low, high = row["B"]
            is_ours = "chunks" not in row["reading"] and "full" not in row["reading"]
            colour = "#4c72b0" if is_ours else "#bdbdbd"
            panel.barh(place, middle, xerr=[[middle - low], [high - middle]], color=colour)
            panel.text(0.41, place, row["reading"], va="center", fontsize=9)
        panel.set(title=f"{number} vector{'s' * (number > 1)} a document", xlim=(0.4, 1.0))
        panel.set(xlabel="MRR, with 95% intervals", yticks=[])
        panel.invert_yaxis()
    figure.savefig(PICTURES / "quality.png", dpi=110)


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    patterns()
    cost()
    quality()
