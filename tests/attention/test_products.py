"""Whole products on a CPU: gradients of what is computed again, dropout that repeats, nothing kept."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lsg_patch.attention import lsg_attention
from lsg_patch.attention.backends import pieces as work

SETTINGS: dict[str, Any] = {
    "block_size": 4,
    "sparse_block_size": 4,
    "num_global_tokens": 1,
    "backend": "sdpa",
}


def inputs(rows: int, *, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, rows, 2, 4, dtype=dtype, generator=generator)
        .transpose(1, 2)
        .requires_grad_()
        for _ in range(3)
    ]


def padding(length: int) -> Tensor:
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, length // 2 :] = mask[1, 3:5] = False
    return mask


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of two blocks, so that there are several in a sequence this short."""
    of_block = 24 * (4 + 2 * 4) * 8  # 17 keys in whole cache lines
    monkeypatch.setattr(work, "CACHE_BYTES", 2 * of_block // torch.get_num_threads())


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_the_values(is_causal: bool, dropout_p: float, masked: bool) -> None:
    """With dropout as well: by one seed it is one function."""
    mask = padding(30) if masked else None

    def attend(*tensors: Tensor) -> Tensor:
        torch.manual_seed(0)
        return lsg_attention(
            *tensors,
            mask,
            sparsity_type="stride",
            is_causal=is_causal,
            dropout_p=dropout_p,
            **SETTINGS,
        )

    assert torch.autograd.gradcheck(attend, inputs(1 + 30), fast_mode=True)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("sizes", [(4, 4, 2), (6, 3, 3), (4, 10, 2), (8, 2, 1), (4, 0, 1)], ids=str)
@pytest.mark.parametrize("length", [27, 40])
def test_gradients_equal_those_of_the_dense_backend(
    sizes: tuple[int, int, int], length: int
) -> None:
    """Windows that overlap, that leave gaps, and that the end of the sequence cuts off."""
    block, sparse, factor = sizes
    gradients = []
    for backend in ("dense", "sdpa"):
        tensors = inputs(3 + length)
        out = lsg_attention(
            *tensors,
            padding(length),
            block_size=block,
            sparse_block_size=sparse,
            sparsity_factor=factor,
            sparsity_type="pooling",
            num_global_tokens=3,
            backend=backend,
        )
        gradients.append(torch.autograd.grad(out.square().sum(), tensors))
    for mine, dense in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, dense, rtol=0, atol=1e-10)


def dropped(rate: float, seed: int, length: int = 512) -> Tensor:
    """What becomes of values of 1 when all keys are alike: the share that is kept, rescaled."""
    torch.manual_seed(seed)
    query, _, _ = inputs(1 + length, dtype=torch.float32)
    ones = torch.ones_like(query)
    settings = {**SETTINGS, "block_size": 64, "sparse_block_size": 64}
    out = lsg_attention(query, 0 * ones, ones, dropout_p=rate, sparsity_type="stride", **settings)
    return out[:, :, 1:]  # the global token's row is not computed block by block


def test_what_memory_held_is_of_no_effect_on_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of scores are filled up to whole cache lines; here most rows see nothing at all."""
    mask = torch.zeros(2, 30, dtype=torch.bool)
    mask[0, 7] = True

    def gradients() -> tuple[Tensor, ...]:
        tensors = inputs(1 + 30)
        out = lsg_attention(*tensors, mask, **SETTINGS)
        return torch.autograd.grad(out.sum(), tensors)

    expected, roles = gradients(), set()
    memory_of = work.Workspace.of

    def not_numbers(self: work.Workspace, role: str, like: Tensor, *shape: int) -> Tensor:
        roles.add(role)
        return memory_of(self, role, like, *shape).fill_(torch.nan)

    monkeypatch.setattr(work.Workspace, "of", not_numbers)
    for actual, gradient in zip(gradients(), expected, strict=True):
        assert torch.equal(actual, gradient)
    assert roles >= {"scores", "keys", "values"}
    assert all(bool(x.isfinite().all()) for x in expected)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_rate_of_dropout_is_the_one_asked_for(rate: float) -> None:
    out = dropped(rate, 0)[..., 0].double()
    # 513 * 4 queries of about 300 keys each
    assert out.mean().item() == pytest.approx(1.0, abs=5 * (rate / (1 - rate) / 600_000) ** 0.5)
    assert out.std().item() == pytest.approx((rate / (1 - rate) / 300) ** 0.5, rel=0.15)


def test_all_may_be_dropped() -> None:
    assert not dropped(1.0, 0).any()


def test_dropout_follows_the_seed_of_the_user() -> None:
    assert torch.equal(dropped(0.2, 1), dropped(0.2, 1))
    assert not torch.equal(dropped(0.2, 1), dropped(0.2, 2))


def test_dropout_differs_between_calls_heads_and_blocks() -> None:
    out = dropped(0.5, 3)[..., 0].unflatten(2, (8, 64))
    rows = out.flatten(0, 2)
    assert len(rows.unique(dim=0)) == len(rows)


def test_no_score_is_kept_for_the_backward() -> None:
    kept: set[tuple[int, int]] = set()

    def pack(x: Tensor) -> Tensor:
        kept.add((x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()))
        return x

    tensors = inputs(1 + 4096, dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = lsg_attention(*tensors, dropout_p=0.1, sparsity_type="stride", **SETTINGS)
    assert out.requires_grad
    of_input = sum(x.nbytes for x in tensors)
    # sparse keys and values, the output, and the one row of the global token
    assert sum(size for _, size in kept) < 3.4 * of_input


@pytest.mark.parametrize(("changed", "without"), [(0, 1), (1, 0)])
def test_the_backward_reads_what_autograd_kept(changed: int, without: int) -> None:
    """Hooks on saved tensors (offloading to a CPU or a disk) give others than were saved: zeros here.

    The gradient of queries is a product with the keys, and that of keys one with the queries.
    """
    tensors = inputs(40)

    def unpack(x: Tensor) -> Tensor:
        return torch.zeros_like(x) if x.data_ptr() == tensors[changed].data_ptr() else x

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
        out = lsg_attention(*tensors, block_size=4, sparsity_type="none")
    grads = torch.autograd.grad(out.sum(), tensors)
    assert not grads[without].any()
    assert grads[2].any()


def test_a_second_derivative_is_refused() -> None:
    tensors = inputs(40)
    # without a global token: its one row goes by PyTorch's attention, which refuses as well
    settings = {**SETTINGS, "num_global_tokens": 0}
    out = lsg_attention(*tensors, sparsity_type="stride", **settings)
    (gradient, *_) = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "CACHE_BYTES", 30_000)


def check_gradient_of_values(
    forward_threads: int, backward_threads: int, checkpointed: str = "no", elsewhere: bool = False
) -> None:
    """The output is linear in the values, so that their gradient gives it back."""
    tensors = inputs(1 + 128)

    def attend(*tensors: Tensor) -> Tensor:
        return lsg_attention(*tensors, sparsity_type="stride", dropout_p=0.3, **SETTINGS)

    torch.manual_seed(0)
    with threads(forward_threads):
        if checkpointed == "no":
            out = attend(*tensors)
        else:
            out = checkpoint(attend, *tensors, use_reentrant=checkpointed == "reentrant")

    def backward() -> float:
        with threads(backward_threads):
            out.sum().backward()
        assert tensors[2].grad is not None
        return float((tensors[2].grad * tensors[2]).sum())

    if elsewhere:
        with ThreadPoolExecutor(1) as pool:
            given_back = pool.submit(backward).result()
    else:
        given_back = backward()
    assert given_back == pytest.approx(out.sum().item(), abs=1e-9)


@pytest.mark.usefixtures("small_caches")
@pytest.mark.parametrize(("forward_threads", "backward_threads"), [(1, 2), (2, 1), (1, 4)])
@pytest.mark.parametrize("checkpointed", ["no", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "in another thread"])
def test_dropout_is_that_of_the_forward_on_any_threads(
    forward_threads: int, backward_threads: int, checkpointed: str, elsewhere: bool
) -> None:
    check_gradient_of_values(forward_threads, backward_threads, checkpointed, elsewhere)


def test_dropout_is_that_of_the_forward_whatever_has_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sizes of caches, determinism, the default dtype and autocast."""
    tensors = inputs(1 + 128)
    out = lsg_attention(*tensors, sparsity_type="stride", dropout_p=0.3, **SETTINGS)
    monkeypatch.setattr(work, "CACHE_BYTES", 30_000)
    torch.use_deterministic_algorithms(True)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (gradient,) = torch.autograd.grad(out.sum(), tensors[2])
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(torch.float32)
    assert float((gradient * tensors[2]).sum()) == pytest.approx(out.sum().item(), abs=1e-9)


@pytest.mark.parametrize("num_global_tokens", [0, 1])
def test_a_mask_that_is_changed_after_the_forward_is_of_no_effect(num_global_tokens: int) -> None:
    mask, gradients = padding(30), []
    settings = {**SETTINGS, "num_global_tokens": num_global_tokens}
    for change in (False, True):
        tensors = inputs(num_global_tokens + 30)
        out = lsg_attention(*tensors, mask, sparsity_type="stride", **settings)
        if change:
            mask.logical_not_()
        gradients.append(torch.autograd.grad(out.sum(), tensors))
    for actual, expected in zip(*gradients, strict=True):
        assert torch.equal(actual, expected)
