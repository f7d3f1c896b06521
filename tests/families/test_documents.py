"""Layouts: the global token that replaces cls has the empty place that cls has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lsg_patch
from tests.models import assert_same, ids_like, right_padded, run, tiny_model

SHORT, LONG = right_padded(32, 19), right_padded(150, 90)


def places(family: str, mask: Tensor) -> dict[str, Tensor]:
    """Random ones, but for the first token."""
    generator = torch.Generator().manual_seed(0)

    def random(most: int, *size: int) -> Tensor:
        return torch.randint(0, most, (*mask.shape, *size), generator=generator)

    if family == "layoutlm":
        corner = random(16, 2)
        boxes = torch.cat([corner, corner + random(16, 2)], dim=-1)
        boxes[:, 0] = 0
        return {"bbox": boxes}
    tags, indices = random(7, 3), random(8, 3)
    tags[:, 0], indices[:, 0] = 7, 8
    return {"xpath_tags_seq": tags, "xpath_subs_seq": indices}


@pytest.mark.parametrize("family", ["layoutlm", "markuplm"])
@pytest.mark.parametrize("train", [False, True])
def test_short_documents_give_the_original(family: str, train: bool) -> None:
    model, ids = tiny_model(family).train(train), ids_like(SHORT, family)
    given: dict[str, Any] = places(family, SHORT)
    expected = run(model, ids, SHORT, **given)
    with lsg_patch.patched(model, block_size=16):
        assert_same(run(model, ids, SHORT, **given), expected, SHORT, 1e-5)
        # and the places matter
        without = run(model, ids, SHORT)["last_hidden_state"]
    assert (without - expected["last_hidden_state"])[SHORT.bool()].abs().max() > 1e-2


@pytest.mark.parametrize("family", ["layoutlm", "markuplm"])
def test_long_documents(family: str) -> None:
    model = lsg_patch.patch_model(tiny_model(family), block_size=16, sparse_block_size=16)
    output = run(model, ids_like(LONG, family), LONG, **places(family, LONG))["last_hidden_state"]
    assert output.shape == (2, 150, 32) and torch.isfinite(output).all()
