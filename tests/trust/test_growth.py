"""Memory that does not grow: by patching, by forwards of many lengths, by models that are gone."""

from __future__ import annotations

import copy
import gc
import itertools
import os
import random
import sys
import tracemalloc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

import lsg_patch
from lsg_patch.attention.geometry import _runs
from lsg_patch.modules.swapped import Swapped, _swapped_class, swapped_class
from tests.models import tiny_model
from tests.tokenizers import tokenizer_like

SETTINGS: dict[str, Any] = {"block_size": 8, "sparse_block_size": 8, "max_position_embeddings": 999}
# the whole of it takes minutes
CYCLES, FORWARDS = (500, 2000) if "LSG_LONG_TESTS" in os.environ else (60, 240)
KIB = 1024


def resident() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(step: Callable[[int], Any], count: int) -> tuple[float, int]:
    """Bytes left in Python's memory by a step of the best sixth but the first, and in all by the last half.

    What grows with every step grows in every sixth; what replaces memory that was not traced counts as new.
    """
    tracemalloc.start()
    try:
        counts = []
        for sixth in range(6):
            for i in range(sixth * count // 6, (sixth + 1) * count // 6):
                step(i)
            sys._clear_type_cache()  # it keeps names, up to 4,096 of them
            _runs.cache_clear()  # its bound has its own test below
            gc.collect()
            counts.append((tracemalloc.get_traced_memory()[0], resident()))
    finally:
        tracemalloc.stop()
    of_python = min(after[0] - before[0] for before, after in itertools.pairwise(counts))
    return of_python / (count / 6), counts[-1][1] - counts[2][1]


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")


@linux
def test_patching_leaves_nothing() -> None:
    """A cycle makes a table of 2 MiB, and 130 KiB in Python's memory."""
    model, tokenizer = tiny_model("bert", num_hidden_layers=1), tokenizer_like()
    how = {**SETTINGS, "max_position_embeddings": 16_000, "sparsity_type": "lsh"}

    def cycle(i: int) -> None:
        lsg_patch.unpatch_model(lsg_patch.patch_model(model, tokenizer=tokenizer, **how))

    of_python, in_all = growth(cycle, CYCLES)
    assert of_python < 128 and in_all < CYCLES / 4 * KIB**2, (of_python, in_all)


@linux
def test_forwards_of_many_lengths_leave_nothing() -> None:
    model = tiny_model("bert", num_hidden_layers=1)
    lsg_patch.patch_model(model, tokenizer=tokenizer_like(), **SETTINGS, sparsity_type="lsh")
    lengths = random.Random(0).sample(range(2, 333), 100)

    def forward(i: int) -> None:
        ids = torch.ones(2, lengths[i % 100], dtype=torch.long)
        mask = torch.ones_like(ids)
        mask[0, i % len(mask[0]) :] = 0
        with torch.no_grad():
            model(ids, attention_mask=mask)

    of_python, in_all = growth(forward, FORWARDS)
    assert of_python < 128 and in_all < 20 * KIB**2, (of_python, in_all)


def test_models_that_are_gone_are_gone() -> None:
    """Patched, reverted, run, trained, copied: nothing of ours refers to them."""
    gone = []
    for reverted in (False, True):
        model = tiny_model("bert", num_hidden_layers=1)
        lsg_patch.patch_model(model, tokenizer=tokenizer_like(), **SETTINGS)
        model(torch.ones(1, 50, dtype=torch.long))[0].sum().backward()
        if reverted:
            lsg_patch.unpatch_model(model)
        gone += [weakref.ref(x) for x in (model, model.encoder, *model.parameters())]
        del model
    gc.collect()
    assert not [x for x in gone if x() is not None]


def test_what_is_kept_is_bounded() -> None:
    """Plans of blocks by length, and classes by those of the modules, never by module."""
    model = tiny_model("bert", num_hidden_layers=1)
    before = None
    for _ in range(3):
        with lsg_patch.patched(model, tokenizer=tokenizer_like(), **SETTINGS), torch.no_grad():
            model(torch.ones(1, 50, dtype=torch.long))
        made = _swapped_class.cache_info().misses
        assert before in (None, made)
        before = made
    info = _runs.cache_info()
    assert info.maxsize is not None and info.currsize <= info.maxsize
    assert lsg_patch.attention.backends.flex.plan_of.cache_info().maxsize is not None
    assert lsg_patch.attention.backends.flex.compiled.cache_info().maxsize is not None


def test_classes_of_the_users_own_go_with_their_models() -> None:
    """All but some, which are kept so that what is compiled fits a model that is patched again."""
    first = type("First", (transformers.BertModel,), {})
    model = tiny_model("bert", first, num_hidden_layers=1)
    lsg_patch.patch_model(model, tokenizer=tokenizer_like(), **SETTINGS)
    patched, gone = type(model), []
    kept = _swapped_class.cache_info().maxsize
    assert kept is not None
    for _ in range(kept + 50):
        own = type("Own", (torch.nn.Linear,), {})
        swapped_class(Swapped, own)
        gone.append(weakref.ref(own))
    del own
    gc.collect()
    assert sum(x() is not None for x in gone) <= kept
    # a class that is in use is the same after so many others
    assert type(copy.deepcopy(model)) is patched
    assert type(lsg_patch.unpatch_model(model)) is first
