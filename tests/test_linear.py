"""Memory grows with the length, not with its square: the mask and backward included."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lsg_patch
from lsg_patch.memory import peak_memory
from tests.models import FAMILIES, ids_like, right_padded, tiny_model

LENGTH = 32768


@pytest.fixture(scope="module")
def model() -> Any:
    return lsg_patch.patch_model(tiny_model("bert"), max_position_embeddings=LENGTH)


@pytest.mark.parametrize("padded", [True, False])
def test_forward_at_32768_tokens(model: Any, padded: bool) -> None:
    used = {}
    for length in (LENGTH // 4, LENGTH):
        mask = right_padded(length, length - 300) if padded else None
        ids = ids_like(right_padded(length, length), "bert")
        with torch.no_grad(), peak_memory() as memory:
            model(ids, mask)
        used[length] = memory.peak_bytes
    # scores that are written out (torch 2.1) are some thousand numbers a token
    assert memory.largest_numel < LENGTH**2 / 8, memory.largest_shape
    assert used[LENGTH] <= 4.4 * used[LENGTH // 4]


@pytest.mark.parametrize("sparsity_type", lsg_patch.attention.SPARSITY_TYPES)
def test_no_selection_is_quadratic_in_a_training_step(sparsity_type: str) -> None:
    model = tiny_model("bert", num_hidden_layers=1).train()
    used = {}
    with lsg_patch.patched(
        model,
        block_size=32,
        sparse_block_size=32,
        sparsity_type=sparsity_type,
        max_position_embeddings=8192,
    ):
        for length in (2048, 8192):
            ids = ids_like(right_padded(length, length - 5), "bert")
            with peak_memory() as memory:
                model(ids, right_padded(length, length - 5)).last_hidden_state.sum().backward()
            model.zero_grad()
            used[length] = memory.peak_bytes
    assert used[8192] <= 4.4 * used[2048]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [True, False])
def test_no_family_makes_a_quadratic_mask(family: str, padded: bool) -> None:
    length = 1024
    mask = right_padded(length, length - 300)
    ids = ids_like(mask, family)
    settings: dict[str, Any] = {"block_size": 16, "sparse_block_size": 16}
    model = lsg_patch.patch_model(tiny_model(family), **settings)
    with torch.no_grad(), peak_memory() as memory:
        model(input_ids=ids, attention_mask=mask if padded else None)
    assert memory.largest_numel < length**2, memory.largest_shape


def test_the_unpatched_model_is_seen_to_be_quadratic() -> None:
    """So that the measure above can fail."""
    model = tiny_model("bert", max_position_embeddings=4096, attn_implementation="eager")
    ids = ids_like(right_padded(4096, 4000), "bert")
    with torch.no_grad(), peak_memory() as memory:
        model(ids[:, :2048], right_padded(2048, 2000))
    assert memory.largest_numel >= 2 * 4 * 2048**2
