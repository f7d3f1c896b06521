"""Where tokens lie in the stack, and which of them are seen there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lsg_patch import LSGConfig
from lsg_patch.modules.layout import Batch, Layout, lay_out


def laid_out(mask: Tensor, **settings: object) -> Layout:
    config = LSGConfig(block_size=4, sparse_block_size=4, **settings)
    return lay_out(mask, mask.shape[1], config, mask.device)


def test_a_mask_that_hides_nothing_is_none() -> None:
    """As without a mask: attention is faster then."""
    assert laid_out(torch.ones(2, 8, dtype=torch.bool)).key_mask is None
    assert laid_out(torch.ones(2, 12, dtype=torch.bool), mask_first_token=False).key_mask is None


@pytest.mark.parametrize("length", [8, 11, 12])
@pytest.mark.parametrize("place", [0, 2, 7])
def test_a_mask_that_hides_one_token_stays(length: int, place: int) -> None:
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, place] = False
    key_mask = laid_out(mask, mask_first_token=False).key_mask
    assert key_mask is not None
    # padding on the left is turned to the right: the row has as much of it either way
    assert (~key_mask).sum(1).tolist() == [0, 1]


def test_a_masked_first_token_stays_hidden() -> None:
    masked = laid_out(torch.ones(1, 11, dtype=torch.bool), mask_first_token=True).key_mask
    assert masked is not None
    assert masked.tolist() == [[False, *[True] * 10]]


@pytest.mark.parametrize("most", [1, 9, 10, 25, 30, 35, 1000])
def test_parts_are_the_batches_in_order_and_no_larger_than_they_may_be(most: int) -> None:
    masks = torch.arange(4 * 7).view(4, 7) % 3 > 0
    batches = (Batch(4, 8, masks), Batch(1, 20, None), Batch(2, 3, None), Batch(3, 1, masks[:1]))
    count = sum(batch.rows for batch in batches)
    angles = torch.arange(count)[None, :, None]
    layout = Layout(None, torch.zeros(1, 1), rotation=(angles, -angles), batches=batches)
    parts = layout.parts(most)
    assert torch.cat([torch.arange(count)[rows] for rows, _ in parts]).tolist() == [*range(count)]
    for rows, part in parts:
        size = rows.stop - rows.start
        assert size == sum(batch.rows for batch in part.batches)
        assert size <= most or sum(batch.sequences for batch in part.batches) == 1
        assert part.rotation is not None
        assert torch.equal(part.rotation[0], angles[:, rows])
        assert torch.equal(part.rotation[1], -angles[:, rows])
    split = [batch for _, part in parts for batch in part.batches]
    for of, size in zip(batches, (8, 20, 3, 1), strict=True):
        own = [batch for batch in split if batch.size == size]
        assert sum(batch.sequences for batch in own) == of.sequences
        if of.key_mask is not None and len(of.key_mask) > 1:
            found = [batch.key_mask for batch in own if batch.key_mask is not None]
            assert torch.equal(torch.cat(found), of.key_mask)
        else:
            assert all(batch.key_mask is of.key_mask for batch in own)
