"""The first global tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lsg_patch
from lsg_patch.modules.global_embeddings import initial_rows, strided_positions
from tests.models import CLS, MASK, tiny_model


@given(st.integers(1, 3000), st.integers(1, 2000))
def test_strided_positions_are_different_positions_of_the_table(num: int, stride: int) -> None:
    order = strided_positions(num, stride)
    assert len(order) == len(set(order.tolist())) == min(512, num // max(1, num // 512))
    assert order[0] == 0
    assert 0 <= order.min() <= order.max() < num
    if len(order) > 1 and stride < len(order) and num <= 512:
        assert order[1] == stride  # far apart


@pytest.mark.parametrize("count", [1, 2, 9, 64, 512])
def test_rows_are_sums_of_the_models_own_tables(count: int) -> None:
    """64 positions only: further tokens take the same positions again, nothing is random."""
    model = tiny_model("roberta", type_vocab_size=2)
    tables = model.embeddings
    words, positions = tables.word_embeddings.weight, tables.position_embeddings.weight.clone()
    kind = tables.token_type_embeddings.weight[0]
    lsg_patch.patch_model(model, num_global_tokens=count, global_positional_stride=16)
    rows = lsg_patch.global_embeddings(model)
    assert rows.shape == (count, 32)
    assert torch.equal(rows[0], words[CLS] + positions[2] + kind)
    order = [*range(0, 64, 16), *range(1, 64, 16)]
    for row, position in zip(rows[1:], order[1:], strict=False):
        assert torch.equal(row, words[MASK] + positions[2 + position] + kind)
    if count == 512:
        assert torch.equal(rows[1:448], rows[65:])


def test_random_rows_have_the_words_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator)
    words = torch.randn(4000, 6, generator=generator) @ mixing + 3
    rows = initial_rows(
        words,
        torch.zeros(1, 6),
        None,
        num_global_tokens=20001,
        stride=1,
        bos_id=5,
        mask_id=None,
        random_init=True,
        seed=1,
    )
    assert torch.equal(rows[0], words[5])
    torch.testing.assert_close(rows[1:].mean(0), words.mean(0), rtol=0, atol=0.1)
    torch.testing.assert_close(rows[1:].T.cov(), words.T.cov(), rtol=0, atol=0.4)


def test_random_init_works_for_small_vocabularies_and_repeats_with_its_seed() -> None:
    """The reference needs a covariance of full rank: more words than dimensions."""
    drawn = []
    for seed in (None, 0, 1):
        model = tiny_model("bert", vocab_size=20)
        state = torch.get_rng_state()
        lsg_patch.patch_model(model, num_global_tokens=4, random_global_init=True, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append(lsg_patch.global_embeddings(model).detach())
    assert torch.isfinite(drawn[0]).all()
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])
