"""Pieces are a partition of the work; the memory they are done in is used again, never at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lsg_patch.attention import lsg_attention
from lsg_patch.attention.backends import pieces as work
from lsg_patch.attention.backends import sdpa
from lsg_patch.attention.backends.pieces import pieces, workspace
from lsg_patch.attention.geometry import Geometry


@pytest.fixture(autouse=True)
def no_idle_workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "_idle", [])


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 13),
    blocks=st.integers(1, 9),
    most=st.integers(0, 40),
)
def test_pieces_are_all_blocks_of_all_heads_once(
    batch: int, heads: int, blocks: int, most: int
) -> None:
    """Whatever fits into a piece, which nothing need do."""
    run = Geometry(4).whole(4 * blocks)
    query = torch.empty(batch, heads, 4 * blocks, 2)
    done = torch.zeros(batch, heads, blocks)
    of_block = 12 * (2 * 2 + 4) * 4
    for piece in pieces(query, run, 12, most * of_block):
        done[piece] += 1
        # one more of each at most, to make them even
        assert done[piece].shape[0] * done[piece].shape[1] <= max(2, 2 * most)
    assert bool((done == 1).all())


def inputs(length: int = 300, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 3, length, 8, dtype=dtype, generator=generator) for _ in range(3))


def attend(*tensors: Tensor, block_size: int = 16) -> Tensor:
    return lsg_attention(
        *tensors, block_size=block_size, sparse_block_size=16, sparsity_type="stride"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_blas", [True, False])
def test_the_memory_of_a_call_is_used_by_the_next(
    dtype: torch.dtype, has_blas: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdpa, "HAS_BLAS", has_blas)
    tensors = inputs(dtype=dtype)
    expected = attend(*tensors)
    (kept,) = work._idle
    places = [x.data_ptr() for x in kept._memory.values()]
    assert places
    for memory in kept._memory.values():
        memory.fill_(float("nan"))  # what it holds is of no effect
    assert torch.equal(attend(*tensors), expected)
    assert work._idle == [kept]
    assert [x.data_ptr() for x in kept._memory.values()] == places


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("then", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_memory_outlives_the_mode_it_was_made_in(first: type, then: type) -> None:
    tensors = inputs()
    with first():
        expected = attend(*tensors)
    with then():
        assert torch.equal(attend(*tensors), expected)
    training = [x.clone().requires_grad_() for x in tensors]
    attend(*training).sum().backward()
    assert all(x.grad is not None for x in training)


def test_calls_at_once_have_memory_of_their_own() -> None:
    with workspace() as one, workspace() as other:
        assert one is not other
    number, barrier = 6, Barrier(6)
    texts = [tuple(x + i for x in inputs()) for i in range(number)]
    expected = [attend(*text) for text in texts]

    def repeatedly(i: int) -> bool:
        barrier.wait()
        return all(torch.equal(attend(*texts[i]), expected[i]) for _ in range(20))

    with ThreadPoolExecutor(number) as pool:
        assert all(pool.map(repeatedly, range(number)))
    assert len(work._idle) <= work.KEPT_WORKSPACES


def test_memory_is_given_back_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="shape"), workspace() as memory:
        memory.of("keys", torch.empty(0), 3).view(2)
    assert work._idle == [memory]


def test_what_is_large_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "KEPT_BYTES", 4 * 100)
    with workspace() as memory:
        for role, size in (("keys", 100), ("values", 101)):
            memory.of(role, torch.empty(0), size)
    assert [role for role, _ in memory._memory] == ["keys"]


def test_without_a_blas_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs()
    assert torch.backends.mkl.is_available() == sdpa.HAS_BLAS
    results = []
    for has_blas in (True, False):
        monkeypatch.setattr(sdpa, "HAS_BLAS", has_blas)
        results.append(attend(*tensors))
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)
    # two ways, and not one way twice
    assert not torch.equal(*results)
