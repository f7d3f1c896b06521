"""What one release of transformers wrote, another one reads: tests/saved has what several wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lsg_patch
from tests import models, seq2seq

FOLDERS = sorted(
    file.parent for file in (Path(__file__).parent.parent / "saved").glob("*/expected.json")
)
MASK = models.right_padded(40, 23)


def outputs(model: Any) -> dict[str, torch.Tensor]:
    if model.config.model_type == "bart":
        found = seq2seq.run(model, seq2seq.ids_like(MASK), MASK)
        return {"logits": found["logits"][..., :9]}
    found = models.run(model, models.ids_like(MASK, "bert"), MASK)
    return {"logits": found["logits"]}


@pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])
def test_other_releases_checkpoints(folder: Path, tmp_path: Path) -> None:
    expected = json.loads((folder / "expected.json").read_text("utf-8"))
    model = lsg_patch.from_pretrained(folder)
    found = outputs(model)
    assert lsg_patch.get_config(model).num_global_tokens == 2
    for name, values in expected.items():
        torch.testing.assert_close(found[name], torch.tensor(values), rtol=0, atol=1e-5)
    # on from here by this release
    model.save_pretrained(tmp_path)
    for name, value in outputs(lsg_patch.from_pretrained(tmp_path)).items():
        assert torch.equal(value, found[name])


def test_there_are_some() -> None:
    releases = {folder.name.split("-")[0] for folder in FOLDERS}
    assert {"4.18.0", "4.36.2", "5.23.0"} <= releases
