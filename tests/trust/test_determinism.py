"""The same inputs give the same outputs: again, under torch's strict mode, alone and in a batch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lsg_patch
from lsg_patch.attention import SPARSITY_TYPES
from tests import seq2seq
from tests.models import FAMILIES, ids_like, padding_id, run, takes, tiny_model
from tests.tokenizers import tokenizer_like

SETTINGS: dict[str, Any] = {"block_size": 8, "sparse_block_size": 8, "max_position_embeddings": 99}
TOLERANCE = 1e-5


@pytest.fixture
def strict() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def model_of(family: str, **settings: Any) -> Any:
    is_pair = family in seq2seq.FAMILIES
    model = seq2seq.tiny_model(family) if is_pair else tiny_model(family)
    how = {**SETTINGS, **settings}
    return lsg_patch.patch_model(model, tokenizer=tokenizer_like(), **how)


def padded(length: int, left: int, right: int) -> Tensor:
    return torch.tensor([[0] * left + [1] * length + [0] * right])


def states(model: Any, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Of the encoder alone, in an encoder-decoder."""
    return run(model.get_encoder() if model.config.is_encoder_decoder else model, ids, mask)


def random_states() -> list[Any]:
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
@pytest.mark.parametrize("unpad", [False, True], ids=["padded", "unpadded"])
def test_strict_mode_and_random_state(sparsity_type: str, unpad: bool, strict: None) -> None:
    """Forward and backward, patch and revert, twice: the same bits, and no random number is drawn."""
    before, found = random_states(), []
    for _ in range(2):
        torch.set_rng_state(torch.tensor(before[2], dtype=torch.uint8))
        model = tiny_model("bert")
        at_first = random_states()
        lsg_patch.patch_model(
            model,
            tokenizer=tokenizer_like(),
            **SETTINGS,
            sparsity_type=sparsity_type,
            unpad=unpad,
            random_global_init=True,
            num_global_tokens=3,
            seed=7,
        )
        mask = torch.cat([padded(60, 0, 5), padded(41, 9, 15)])
        out = model(input_ids=ids_like(mask, "bert"), attention_mask=mask)[0]
        out.square().mean().backward()
        gradients = [x.grad for x in model.parameters() if x.grad is not None]
        lsg_patch.unpatch_model(model)
        assert random_states() == at_first
        found.append([out.detach(), *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("sparsity_type", ["norm", "lsh"])
def test_a_seed_says_all(sparsity_type: str) -> None:
    how = {"sparsity_type": sparsity_type, "random_global_init": True, "num_global_tokens": 3}
    ids = ids_like(padded(60, 0, 0), "bert")

    def out_of(seed: int | None) -> Tensor:
        return states(model_of("bert", **how, seed=seed), ids, None)["last_hidden_state"]

    assert torch.equal(out_of(5), out_of(5))
    assert torch.equal(out_of(None), out_of(0))
    assert not torch.equal(out_of(5), out_of(6))


LENGTH = 43


def rows_of(model: Any, family: str, left: int, right: int) -> tuple[Tensor, Tensor]:
    """The same row with padding around it: alone, and as the first of a batch."""
    like = seq2seq.ids_like if family in seq2seq.FAMILIES else lambda m: ids_like(m, family)
    mask = padded(LENGTH, left, right)
    ids = like(mask)
    ids[:, left : left + LENGTH] = like(padded(LENGTH, 0, 0))
    others = torch.cat([padded(60, 0, 0), padded(5, 40, 15), torch.zeros(1, 60, dtype=torch.long)])
    others = others[:, : mask.shape[1]]
    all_ids, all_masks = torch.cat([ids, like(others)]), torch.cat([mask, others])
    encoder, own = (model.get_encoder(), 0) if model.config.is_encoder_decoder else (model, 1)
    found = []
    for some_ids, some_mask in ((ids, mask), (all_ids, all_masks)):
        given = {}
        if own and takes(model, "position_ids") and padding_id(family) == 0:
            # absolute positions count from the row's start; where words count, they do so themselves
            given["position_ids"] = (some_mask.cumsum(1) - 1).clamp(min=0)
        out = run(encoder, some_ids, some_mask, **given)["last_hidden_state"]
        found.append(out[0, left : left + LENGTH])
    return found[0], found[1]


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=TOLERANCE)


def assert_alone_as_in_a_batch(model: Any, family: str, unpatched: Any) -> None:
    alone, _ = rows_of(model, family, 0, 0)
    for left, right in ((0, 17), (17, 0), (8, 9)):
        padded_alone, in_batch = rows_of(model, family, left, right)
        assert close(in_batch, padded_alone), (left, right)
        # a few families read positions from the left end alone: padding there is another input
        own = [rows_of(unpatched, family, *around)[0] for around in ((0, 0), (left, right))]
        if close(*own):
            assert close(padded_alone, alone), (left, right)
        else:
            assert family in POSITIONS_FROM_THE_LEFT and left


POSITIONS_FROM_THE_LEFT = {"distilbert", "bart"}


@pytest.mark.parametrize("family", [*FAMILIES, "bart"])
def test_a_row_is_the_same_alone_and_in_a_batch(family: str) -> None:
    is_pair = family in seq2seq.FAMILIES
    unpatched = seq2seq.tiny_model(family) if is_pair else tiny_model(family)
    assert_alone_as_in_a_batch(model_of(family), family, unpatched)


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
@pytest.mark.parametrize("unpad", [False, True], ids=["padded", "unpadded"])
def test_a_row_of_every_selection(sparsity_type: str, unpad: bool) -> None:
    model = model_of("bert", sparsity_type=sparsity_type, unpad=unpad)
    assert_alone_as_in_a_batch(model, "bert", tiny_model("bert"))
