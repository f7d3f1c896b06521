"""Parts of the selections: all of them against the oracle are in ``test_functional.py``."""

from __future__ import annotations

import pytest
import torch

from lsg_patch.attention.sparsity import _Buckets, _longest


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sums_of_buckets_are_of_the_seen_tokens_in_them(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch, heads, chunks, chunk, size, width = 2, 3, 2, 8, 5, 4
    bucket = torch.randint(size, (batch, heads, chunks, chunk))
    seen = torch.rand(batch, 1, chunks, chunk) < 0.7
    # whole numbers, whose sums are exact in every dtype, laid out as projections are
    x = torch.randint(-9, 9, (batch, chunks * chunk, heads, width)).to(dtype).transpose(1, 2)
    found = _Buckets(bucket, seen, size).sums(x)
    expected = torch.zeros(batch, heads, chunks, size, width, dtype=dtype)
    for b, h, c, t in torch.cartesian_prod(*map(torch.arange, bucket.shape)).tolist():
        if seen[b, 0, c, t]:
            expected[b, h, c, bucket[b, h, c, t]] += x[b, h, c * chunk + t]
    assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_what_is_exported_chooses_the_same_among_equals() -> None:
    """It counts what comes before, where eager code ranks bits."""
    norm = torch.randint(0, 3, (300, 8), generator=torch.Generator().manual_seed(0)).float()
    for count in (1, 3, 8):
        traced = torch.jit.trace(lambda x, n=count: _longest(x, n, True), norm[:2])
        assert torch.equal(traced(norm), _longest(norm, count, True))
