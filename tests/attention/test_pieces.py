"""Pieces are a partition of the work, whatever fits into one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lsg_patch.attention import RelativeBias, lsg_attention
from lsg_patch.attention.backends import pieces as work
from lsg_patch.attention.backends import sdpa
from lsg_patch.attention.backends.pieces import Workspace, pieces
from lsg_patch.attention.blocks import Blocks, Keys
from lsg_patch.attention.geometry import Geometry


@given(
    batch=st.integers(1, 7),
    heads=st.integers(1, 13),
    length=st.integers(9, 40),
    most=st.integers(0, 99),
)
def test_pieces_are_all_queries_once(batch: int, heads: int, length: int, most: int) -> None:
    """Whatever fits into a piece, which nothing need do."""
    x = torch.empty(batch, heads, length, 2)
    keys = Keys(x, x, torch.ones(batch, 1, length, dtype=torch.bool))
    no_keys = Keys(*(x[:, :, :0] for x in keys[:3]))
    blocks = Blocks(x, no_keys, None, keys, Geometry(4), scale=1.0)
    done = torch.zeros(batch, heads, length, 1)
    block_bytes = 12 * (2 * 2 + 4) * 4  # of the blocks that see most
    for piece in pieces(blocks, most * block_bytes):
        done_now = piece.part(done)
        done_now += 1
        assert done_now.shape[:4] == piece.shape == piece.query.shape[:4]
        num_bytes = done_now.shape[:3].numel() * piece.num_keys * (4 + piece.run.num_queries) * 4
        # one more of the heads and of the blocks at most, to make them even
        assert num_bytes <= max(4, 2 * most) * block_bytes
    assert bool((done == 1).all())


def inputs(
    length: int = 300, dtype: torch.dtype = torch.float32, batch: int = 2
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(batch, 3, length, 8, dtype=dtype, generator=generator) for _ in range(3)
    )


def attend(*tensors: Tensor, block_size: int = 16, **settings: Any) -> Tensor:
    how: dict[str, Any] = {"sparse_block_size": 16, "sparsity_type": "stride"}
    return lsg_attention(*tensors, block_size=block_size, **how | settings)


@pytest.mark.parametrize("by_products", [True, False])
@pytest.mark.parametrize("num_bytes", [1, 9_000, 40_000, 1 << 30])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_size_of_pieces_changes_nothing(
    by_products: bool,
    num_bytes: int,
    masked: bool,
    biased: bool,
    is_causal: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From one block of a head to the whole batch, forward and backward."""
    monkeypatch.setattr(sdpa, "HAS_BLAS", by_products)
    tensors = [x.requires_grad_() for x in inputs(90, torch.float64, batch=5)]
    settings: dict[str, Any] = {"is_causal": is_causal}
    if masked:
        settings["padding_mask"] = torch.arange(90) < torch.tensor([[90], [70], [5], [33], [90]])
    if biased:
        table = torch.randn(3, 2 * 40 + 1, generator=torch.Generator().manual_seed(0))
        settings["relative_bias"] = RelativeBias(table, torch.arange(90) + torch.arange(5)[:, None])
    expected = attend(*tensors, backend="dense", **settings)
    seen = settings.get("padding_mask", torch.ones(5, 90, dtype=torch.bool))[:, None, :, None]
    gradients = torch.autograd.grad((expected * seen).square().sum(), tensors)
    monkeypatch.setattr(work, "CACHE_BYTES", num_bytes // torch.get_num_threads())
    with torch.no_grad():
        torch.testing.assert_close(attend(*tensors, **settings) * seen, expected * seen)
    out = attend(*tensors, **settings)
    torch.testing.assert_close(out * seen, expected * seen)
    for actual, gradient in zip(
        torch.autograd.grad((out * seen).square().sum(), tensors), gradients, strict=True
    ):
        torch.testing.assert_close(actual, gradient)


class Count(TorchDispatchMode):
    """How many operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_products", [True, False])
def test_rows_that_are_small_are_taken_together(
    by_products: bool, dtype: torch.dtype, trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdpa, "HAS_BLAS", by_products)

    def operations(batch: int) -> int:
        tensors = [x.requires_grad_(trains) for x in inputs(40, dtype, batch)]
        with Count() as count:
            attend(*tensors, sparsity_type="norm")
        return count.number

    assert operations(64) < 1.5 * operations(1)


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("then", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_no_call_depends_on_the_mode_of_the_one_before(first: type, then: type) -> None:
    tensors = inputs()
    with first():
        expected = attend(*tensors)
    with then():
        assert torch.equal(attend(*tensors), expected)
    training = [x.clone().requires_grad_() for x in tensors]
    attend(*training).sum().backward()
    assert all(x.grad is not None for x in training)


def test_calls_at_once_have_memory_of_their_own() -> None:
    number, barrier = 6, Barrier(6)
    texts = [tuple(x + i for x in inputs()) for i in range(number)]
    expected = [attend(*text) for text in texts]

    def repeatedly(i: int) -> bool:
        barrier.wait()
        return all(torch.equal(attend(*texts[i]), expected[i]) for _ in range(20))

    with ThreadPoolExecutor(number) as pool:
        assert all(pool.map(repeatedly, range(number)))


def test_memory_is_used_again_where_it_is_large_enough() -> None:
    memory, like = Workspace(), torch.empty(0)
    first = memory.of("keys", like, 2, 3)
    assert memory.of("keys", like, 5).data_ptr() == first.data_ptr()
    assert memory.of("values", like, 5).data_ptr() != first.data_ptr()
    assert memory.of("keys", like, 7).shape == (7,)


def test_by_products_and_by_fused_attention_the_result_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors = inputs()
    results = []
    for by_products in (True, False):
        monkeypatch.setattr(sdpa, "HAS_BLAS", by_products)
        results.append(attend(*tensors))
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)
    # two ways, and not one way twice
    assert not torch.equal(*results)
