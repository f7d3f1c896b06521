"""`peak_memory` against sequences of allocations whose sizes are known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lsg_patch.memory import peak_memory

KIB = 1024  # bytes; 256 float32 numbers


def kib(n: int) -> torch.Tensor:
    return torch.empty(n * 256)


def test_nothing_allocated_is_nothing_counted():
    with peak_memory() as memory:
        pass
    assert (memory.peak_bytes, memory.largest_numel) == (0, 0)


def test_peak_is_what_was_alive_at_once():
    with peak_memory() as memory:
        a = kib(4)
        b = kib(2)
        assert memory.peak_bytes == 6 * KIB
        del a
        c = kib(3)  # 2 + 3 are alive now, 6 were
        assert memory.peak_bytes == 6 * KIB
        d = kib(5)
    assert memory.peak_bytes == 10 * KIB
    assert memory.largest_numel == 5 * 256
    assert memory.largest_shape == (5 * 256,)
    del b, c, d


def test_a_loop_that_frees_needs_one_tensor():
    with peak_memory() as memory:
        for _ in range(100):
            kib(1)
    assert memory.peak_bytes == KIB


def test_an_address_used_again_is_counted_again():
    with peak_memory() as memory:
        kept = []
        for _ in range(50):
            kib(8)  # freed at once: the next one may well lie in the same place
            kept.append(kib(1))
    assert memory.peak_bytes == (8 + 49) * KIB


def test_views_do_not_count_and_keep_the_storage_alive():
    with peak_memory() as memory:
        view = kib(4).view(32, 32)[:1].expand(64, 32)
        view.as_strided((1000, 1000), (0, 0))
        assert memory.peak_bytes == 4 * KIB
        assert memory.largest_numel == 4 * 256
        other = kib(1)
    assert memory.peak_bytes == 5 * KIB
    del view, other


def test_in_place_and_out_operations_do_not_count():
    with peak_memory() as memory:
        x = torch.ones(256)
        y = torch.ones(256)
        x.add_(y).mul_(2).clamp_(min=0)
        torch.add(x, y, out=y)
    assert memory.peak_bytes == 2 * KIB


def test_out_that_has_to_grow_counts_its_new_size():
    x = torch.ones(256)
    with peak_memory() as memory:
        out = torch.empty(0)
        torch.add(x, x, out=out)
        assert memory.peak_bytes == KIB
        out.resize_(512)
    assert memory.peak_bytes == 2 * KIB


def test_what_was_there_before_does_not_count():
    before = torch.ones(512, 512)
    with peak_memory() as memory:
        before.view(-1).add_(1)
        before.t()
        before[0]
    assert memory.peak_bytes == 0


def test_python_numbers_made_into_tensors_count():
    with peak_memory() as memory:
        x = torch.tensor([1.0, 2.0])
    assert memory.peak_bytes == 8
    del x


@pytest.mark.parametrize("inference", [False, True])
def test_an_explicit_square_is_the_largest(inference):
    size, width = 300, 8
    q, k = torch.randn(2, size, width), torch.randn(2, size, width)
    with torch.inference_mode(inference), peak_memory() as memory:
        torch.softmax(q @ k.transpose(1, 2), -1) @ k
    assert memory.largest_numel == 2 * size * size
    assert memory.largest_shape == (2, size, size)
    assert 2 * size * size * 4 * 2 <= memory.peak_bytes <= 2 * size * size * 4 * 2 + 8 * q.nbytes


@pytest.mark.parametrize("inference", [False, True])
def test_a_square_inside_a_composite_operation_is_seen(inference):
    size = 300
    x = torch.randn(1, 1, size, 8, requires_grad=not inference)
    with torch.inference_mode(inference), peak_memory() as memory:
        torch.einsum("bhqd,bhkd->bhqk", x, x)
    assert memory.largest_numel == size * size


def test_fused_attention_allocates_no_square():
    size = 512
    x = torch.randn(1, 2, size, 8)
    with torch.inference_mode(), peak_memory() as memory:
        F.scaled_dot_product_attention(x, x, x)
    assert 0 < memory.largest_numel < size * size


def test_backward_is_counted_too():
    x = torch.randn(256, requires_grad=True)
    with peak_memory() as memory:
        y = x.exp()
        forward = memory.peak_bytes
        y.backward(torch.ones(256))
    assert forward == KIB
    assert memory.peak_bytes >= 3 * KIB  # y, the gradient given, the gradient of x


def test_two_runs_agree_and_an_exception_ends_the_watching():
    def run() -> int:
        with peak_memory() as memory:
            torch.nn.Linear(16, 16)(torch.ones(8, 16)).sum().backward()
        return memory.peak_bytes

    with pytest.raises(ZeroDivisionError), peak_memory() as memory:
        raise ZeroDivisionError
    kib(4)
    assert memory.peak_bytes == 0
    assert run() == run() > 0


def test_blocks_nest():
    with peak_memory() as outer:
        kept = kib(1)
        with peak_memory() as inner:
            kib(2)
    assert (outer.peak_bytes, inner.peak_bytes) == (3 * KIB, 2 * KIB)
    del kept
