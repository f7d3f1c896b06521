"""An interrupt at any line of ours, or in a hook of the user's: the model works, and reverts exactly.

Each is a ``KeyboardInterrupt`` that is raised where Python traces a line of the package, as the first
Ctrl-C of a user is: at the first or the last time that a line runs, of some of the lines, or of all with
LSG_LONG_TESTS.
"""

from __future__ import annotations

import gc
import linecache
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import lsg_patch
from tests import seq2seq
from tests.models import ids_like, right_padded, run, tiny_model
from tests.test_patching import assert_bitwise, fingerprint, values
from tests.tokenizers import tokenizer_like

PACKAGE = str(Path(lsg_patch.__file__).parent)
SETTINGS: dict[str, Any] = {
    "block_size": 8,
    "sparse_block_size": 8,
    "max_position_embeddings": 99,
    "sparsity_type": "lsh",
    "sparsity_factor": 4,
}
MASK = right_padded(60, 41)
TIMES = 24  # interrupts of each test


class Lines:
    """Counts the lines of the package that are run, and interrupts at the one of a number."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.count, self.interrupt_at = 0, interrupt_at
        self.times: dict[tuple[str, int], list[int]] = {}  # when each line ran

    def trace(self, frame: Any, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.count += 1
            line = frame.f_code.co_filename, frame.f_lineno
            # such lines are traced where no Ctrl-C is let in, and no block around them is left in order
            if not linecache.getline(*line).lstrip().startswith(("with ", "try:")):
                self.times.setdefault(line, []).append(self.count)
            if self.count == self.interrupt_at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.trace


@contextmanager
def traced(lines: Lines) -> Iterator[None]:
    before = sys.gettrace()
    sys.settrace(lines.trace)
    try:
        yield
    finally:
        sys.settrace(before)


def interrupts_of(function: Callable[[], Any], undo: Callable[[], Any]) -> Iterator[Lines]:
    """The lines that ``function`` runs, at which it is to be interrupted."""
    counted = Lines()
    function()
    undo()
    gc.collect()  # a revert looks at what other models limit: those of other tests must not go meanwhile
    with traced(counted):
        function()
    undo()
    at = sorted({time for times in counted.times.values() for time in (times[0], times[-1])})
    if "LSG_LONG_TESTS" not in os.environ:
        at = random.Random(0).sample(at, TIMES)
    for time in at:
        yield Lines(time)


def model_of(family: str) -> Any:
    return seq2seq.tiny_model(family) if family in seq2seq.FAMILIES else tiny_model(family)


families = pytest.mark.parametrize("family", ["bert", "roformer", "mpnet", "bart"])


@families
def test_a_patch_that_is_interrupted_changes_nothing(family: str) -> None:
    model, tokenizer = model_of(family), tokenizer_like()
    before, limit = fingerprint(model), tokenizer.model_max_length

    def patch() -> None:
        lsg_patch.patch_model(model, tokenizer=tokenizer, **SETTINGS)

    for lines in interrupts_of(patch, lambda: lsg_patch.unpatch_model(model)):
        with traced(lines), pytest.raises(KeyboardInterrupt):
            patch()
        assert not lsg_patch.is_patched(model), lines.interrupt_at
        assert fingerprint(model) == before, lines.interrupt_at
        assert tokenizer.model_max_length == limit
    patch()
    lsg_patch.unpatch_model(model)


@families
def test_a_revert_that_is_interrupted_is_completed_by_another(family: str) -> None:
    model, tokenizer = model_of(family), tokenizer_like()
    before, weights = fingerprint(model), values(model)
    limit = tokenizer.model_max_length

    def patch() -> None:
        lsg_patch.patch_model(model, tokenizer=tokenizer, **SETTINGS)

    def revert() -> None:
        lsg_patch.unpatch_model(model)

    patch()
    for lines in interrupts_of(revert, patch):
        with traced(lines), pytest.raises(KeyboardInterrupt):
            revert()
        if lsg_patch.is_patched(model):
            revert()
        assert fingerprint(model) == before, lines.interrupt_at
        assert tokenizer.model_max_length == limit
        patch()
    revert()
    assert_bitwise(values(model), weights)


@pytest.mark.parametrize(("family", "trains"), [("bert", True), ("mpnet", False), ("bart", True)])
def test_a_forward_that_is_interrupted_leaves_no_trace(family: str, trains: bool) -> None:
    model = model_of(family)
    before = fingerprint(model)
    lsg_patch.patch_model(model, tokenizer=tokenizer_like(), **SETTINGS)
    ids = seq2seq.ids_like(MASK) if family in seq2seq.FAMILIES else ids_like(MASK, family)

    def forward() -> torch.Tensor:
        with torch.set_grad_enabled(trains):
            out: torch.Tensor = model(input_ids=ids, attention_mask=MASK)[0]
            if trains:
                out.square().mean().backward()
        return out.detach()

    expected, patched = forward(), fingerprint(model)
    for lines in interrupts_of(forward, lambda: None):
        with traced(lines), pytest.raises(KeyboardInterrupt):
            forward()
        assert torch.equal(forward(), expected), lines.interrupt_at
        assert fingerprint(model) == patched, lines.interrupt_at
    model.zero_grad()
    lsg_patch.unpatch_model(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.cuda.OutOfMemoryError])
def test_an_error_in_a_hook_of_the_users(error: type[BaseException]) -> None:
    """In every module of the model, before it and after it."""
    model = tiny_model("bert")
    before = fingerprint(model)
    lsg_patch.patch_model(model, tokenizer=tokenizer_like(), **SETTINGS)
    ids = ids_like(MASK, "bert")
    expected = run(model, ids, MASK)["last_hidden_state"]

    def fail(*args: Any) -> None:
        raise error("of the user")

    calls = 0
    for module in [*model.modules()][::2]:
        for register in (module.register_forward_pre_hook, module.register_forward_hook):
            handle = register(fail)
            try:
                run(model, ids, MASK)
            except error as raised:
                calls += str(raised) == "of the user"
            handle.remove()
            assert torch.equal(run(model, ids, MASK)["last_hidden_state"], expected)
    assert calls > 20
    lsg_patch.unpatch_model(model)
    assert fingerprint(model) == before


def test_an_error_inside_a_with_block_reverts() -> None:
    model = tiny_model("bert")
    before = fingerprint(model)
    for error in (KeyboardInterrupt, SystemExit, MemoryError, GeneratorExit):
        with pytest.raises(error), lsg_patch.patched(model, **SETTINGS):
            raise error
        assert fingerprint(model) == before
