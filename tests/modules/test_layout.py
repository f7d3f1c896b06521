"""Where tokens lie in the stack, and which of them are seen there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lsg_patch import LSGConfig
from lsg_patch.modules.layout import Layout, lay_out


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
