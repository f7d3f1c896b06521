"""One patched model in many threads, and in processes; several models at once."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lsg_patch
from tests import seq2seq
from tests.models import FAMILIES, ids_like, right_padded, run, tiny_model
from tests.test_patching import fingerprint
from tests.tokenizers import tokenizer_like

SETTINGS: dict[str, Any] = {"block_size": 8, "sparse_block_size": 8, "max_position_embeddings": 99}
THREADS = 8
MASKS = [right_padded(90 - 9 * i, 20 + i) for i in range(THREADS)]


def at_once(tasks: list[Callable[[], Any]]) -> list[Any]:
    """What each gives in a thread of its own, all begun together."""
    results: list[Any] = [None] * len(tasks)
    begin = threading.Barrier(len(tasks))

    def work(index: int) -> None:
        begin.wait()
        try:
            results[index] = tasks[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def patched_model(family: str, **settings: Any) -> Any:
    is_pair = family in seq2seq.FAMILIES
    model = seq2seq.tiny_model(family) if is_pair else tiny_model(family)
    return lsg_patch.patch_model(model, tokenizer=tokenizer_like(), **{**SETTINGS, **settings})


def forwards(model: Any, family: str) -> list[Callable[[], torch.Tensor]]:
    """A forward of another length for each thread."""
    like = seq2seq.ids_like if family in seq2seq.FAMILIES else lambda m: ids_like(m, family)

    def forward(mask: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = model(input_ids=like(mask), attention_mask=mask)[0]
        return out

    return [lambda mask=mask: forward(mask) for mask in MASKS]  # type: ignore[misc]


@pytest.mark.parametrize("family", [*FAMILIES, "bart"])
def test_threads_give_what_one_gives(family: str) -> None:
    model = patched_model(family)
    tasks = forwards(model, family)
    expected = [task() for task in tasks]
    for found, want in zip(at_once(tasks), expected, strict=True):
        assert torch.equal(found, want)


@pytest.mark.parametrize("sparsity_type", lsg_patch.attention.SPARSITY_TYPES)
@pytest.mark.parametrize("unpad", [False, True])
def test_threads_of_every_selection(sparsity_type: str, unpad: bool) -> None:
    model = patched_model("bert", sparsity_type=sparsity_type, unpad=unpad)
    tasks = forwards(model, "bert")
    expected = [task() for task in tasks]
    for found, want in zip(at_once(tasks), expected, strict=True):
        assert torch.equal(found, want)


def gradients_of(model: Any, mask: torch.Tensor, backward_in_a_thread: bool = False) -> Any:
    out = model(input_ids=ids_like(mask, "bert"), attention_mask=mask)[0]
    parameters = [x for x in model.parameters() if x.requires_grad]

    def backward() -> Any:
        return torch.autograd.grad(out.square().mean(), parameters, allow_unused=True)

    return at_once([backward])[0] if backward_in_a_thread else backward()


def assert_same(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_training_in_threads() -> None:
    """Forward and backward in the same thread, in different ones, and with other thread counts."""
    model = patched_model("bert")
    expected = [gradients_of(model, mask) for mask in MASKS]
    for elsewhere in (False, True):
        tasks = [lambda m=m, e=elsewhere: gradients_of(model, m, e) for m in MASKS]
        for found, want in zip(at_once(tasks), expected, strict=True):
            assert_same(found, want)
    threads = torch.get_num_threads()
    out = model(input_ids=ids_like(MASKS[0], "bert"), attention_mask=MASKS[0])[0]
    try:
        torch.set_num_threads(3)
        out.square().mean().backward()
    finally:
        torch.set_num_threads(threads)
    assert_same([x.grad for x in model.parameters()], expected[0])


def test_one_model_is_patched_while_another_runs() -> None:
    running, patching = patched_model("bert"), [tiny_model("bert", seed=i) for i in range(3)]
    before = [fingerprint(model) for model in patching]
    expected = [task() for task in forwards(running, "bert")]

    def cycle(model: Any) -> None:
        for _ in range(5):
            with lsg_patch.patched(model, tokenizer=tokenizer_like(), **SETTINGS):
                run(model, ids_like(MASKS[0], "bert"), MASKS[0])

    tasks: list[Callable[[], Any]] = [lambda m=m: cycle(m) for m in patching]  # type: ignore[misc]
    found = at_once([*tasks, lambda: [[t() for t in forwards(running, "bert")] for _ in range(5)]])
    for results in found[-1]:
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert [fingerprint(model) for model in patching] == before


def test_with_blocks_of_two_models_in_any_order() -> None:
    one, two = tiny_model("bert"), tiny_model("roberta")
    tokenizer = tokenizer_like()
    limit, before = tokenizer.model_max_length, [fingerprint(x) for x in (one, two)]
    first, second = (lsg_patch.patched(x, tokenizer=tokenizer, **SETTINGS) for x in (one, two))
    with first, second:
        assert tokenizer.model_max_length == 99
    first, second = (lsg_patch.patched(x, tokenizer=tokenizer, **SETTINGS) for x in (one, two))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not lsg_patch.is_patched(one) and lsg_patch.is_patched(two)
    assert tokenizer.model_max_length == 99
    second.__exit__(None, None, None)
    assert tokenizer.model_max_length == limit
    with lsg_patch.patched(one, **SETTINGS):
        with pytest.raises(ValueError, match="patched already"), lsg_patch.patched(one, **SETTINGS):
            pass
        assert lsg_patch.is_patched(one)
    assert [fingerprint(x) for x in (one, two)] == before


def _in_a_process(model: Any, expected: torch.Tensor, queue: Any) -> None:
    torch.set_num_threads(1)
    found = run(model, ids_like(MASKS[0], "bert"), MASKS[0])["last_hidden_state"]
    lsg_patch.unpatch_model(model)
    again = lsg_patch.patch_model(model, tokenizer=tokenizer_like(), **SETTINGS)
    found_again = run(again, ids_like(MASKS[0], "bert"), MASKS[0])["last_hidden_state"]
    queue.put([bool(torch.equal(x, expected)) for x in (found, found_again)])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_gives_the_same(method: str) -> None:
    """A patched model that a child inherits, or gets as a pickle: used, reverted and patched anew."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip("this system cannot fork")
    model = patched_model("bert")
    expected = run(model, ids_like(MASKS[0], "bert"), MASKS[0])["last_hidden_state"]
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    process = context.Process(target=_in_a_process, args=(model, expected, queue))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert queue.get() == [True, True]
    assert lsg_patch.is_patched(model)
    assert torch.equal(
        run(model, ids_like(MASKS[0], "bert"), MASKS[0])["last_hidden_state"], expected
    )
