"""What makes each row by itself runs on some rows at a time where its memory is used again."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

import lsg_patch
from lsg_patch.modules import layer
from tests.models import FAMILIES, assert_same, ids_like, right_padded, run, tiny_model

SETTINGS: dict[str, Any] = {"block_size": 8, "sparse_block_size": 8, "max_position_embeddings": 128}
MASK = right_padded(93, 80)
# the others have no method for it in their layers
WITH_CHUNKS = [family for family in FAMILIES if family not in ("mpnet", "distilbert")]


def widens(name: str, module: Any) -> bool:
    return isinstance(module, torch.nn.Linear) and module.out_features == 48


def projects(name: str, module: Any) -> bool:
    return name.endswith("attention.output.dense")


# those whose layers have a module for it
WITH_PROJECTIONS = [
    family for family in FAMILIES if any(projects(*x) for x in tiny_model(family).named_modules())
]


def rows_of(which: Any, model: Any, mode: Any) -> list[int]:
    """Rows that modules of the layers run on, one call after the other."""
    seen: list[int] = []
    for name, module in model.named_modules():
        if which(name, module):
            module.register_forward_hook(lambda *call: seen.append(call[2].shape[:2].numel()))
    with mode:
        model(input_ids=torch.full((2, 93), 7), attention_mask=torch.ones(2, 93))
    return seen


@pytest.mark.parametrize(
    ("which", "family"),
    [(widens, family) for family in WITH_CHUNKS]
    + [(projects, family) for family in WITH_PROJECTIONS],
)
@pytest.mark.parametrize("rows", [1, 50, 187])
def test_some_rows_at_a_time_give_what_all_give(
    which: Any, family: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lsg_patch.patch_model(tiny_model(family), **SETTINGS, unpad=False)
    ids = ids_like(MASK, family)
    expected = run(model, ids, MASK)
    monkeypatch.setattr(layer, "ROWS_BY_THEMSELVES", rows)
    assert_same(run(model, ids, MASK), expected, None, 1e-5)
    seen = rows_of(which, model, torch.no_grad())
    # two sequences side by side, of the same rows each
    assert max(seen) <= max(2, rows)
    # in each of two layers, whole blocks and a global token
    assert sum(seen) == 2 * 2 * (96 + 1)


def test_all_of_the_shape_of_bert_have_projections() -> None:
    assert {"bert", "roberta", "electra", "esm", "roformer", "xmod"} < set(WITH_PROJECTIONS)


@pytest.mark.parametrize("which", [widens, projects])
@pytest.mark.parametrize(
    ("mode", "calls"),
    [(torch.no_grad(), 8), (torch.inference_mode(), 8), (contextlib.nullcontext(), 2)],
    ids=["no_grad", "inference_mode", "grad"],
)
def test_what_a_backward_needs_is_made_at_once(
    which: Any, mode: Any, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer, "ROWS_BY_THEMSELVES", 50)
    model = lsg_patch.patch_model(tiny_model("bert"), **SETTINGS)
    assert len(rows_of(which, model, mode)) == calls


def test_half_precision_stays_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "ROWS_BY_THEMSELVES", 50)
    model = lsg_patch.patch_model(tiny_model("bert"), **SETTINGS)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = model.encoder.layer[0].feed_forward_chunk(torch.randn(2, 97, 32))
        monkeypatch.setattr(layer, "ROWS_BY_THEMSELVES", 1000)
        whole = model.encoder.layer[0].feed_forward_chunk(torch.randn(2, 97, 32))
    assert found.dtype == whole.dtype
    assert found.shape == whole.shape
