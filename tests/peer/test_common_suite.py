"""transformers' own tests of its models: what passes unpatched passes patched.

Without global tokens a patched model is the original on short inputs, so every test of it holds.
Beyond two blocks it is another model, for which everything that the tests ask of models in general
has to hold: saved and loaded it is the same, a batch gives what its rows give, it can be trained.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import SkipTest, TestCase

import pytest
import transformers

from tests.peer import cases, fetch
from tests.peer.every_model import every_model_patched
from tests.peer.exceptions import EXCEPTIONS, reason_for

# lossless for the suite's inputs; three blocks of them and a part of one
SETTINGS = {"short": {"block_size": 128}, "blocks": {"block_size": 4, "sparse_block_size": 4}}
COMMON: dict[str, Any] = {"num_global_tokens": 0, "max_position_embeddings": cases.POSITIONS}
HEADS = [(family, head) for family in cases.FAMILIES for head in cases.heads(family)]

# what compares implementations of attention, of which a patched model has one, whatever the lengths;
# and how far a training run gets, which has a bar set for the original's function
ONLY_SHORT = ("test_eager_matches_sdpa_inference_", "test_bc_torch_dtype", "test_training_overfit")

HEADS_OF_SHORT = ("Model", "ForMaskedLM", "ForConditionalGeneration")

# tests of these must have run on patched models for every head, or the comparison says nothing
ALWAYS_COMPARED = (
    "test_batching_equivalence",
    "test_determinism",
    "test_hidden_states_output",
    "test_model_get_set_embeddings",
    "test_resize_embeddings_untied",
    "test_save_load",
    "test_save_load_keys_to_ignore_on_save",
    "test_tied_weights_keys",
)


def make_cases(cache: Path) -> dict[type[Any], type[TestCase]]:
    """The peer's test case of every head."""
    common, training = fetch.load(cache)
    made = {}
    for family, head in HEADS:
        # other heads have no label for each token
        learns = training is not None and head.__name__.endswith("ForMaskedLM")
        mixins = (common.ModelTesterMixin, *([training.TrainingTesterMixin] if learns else []))
        made[head] = cases.case_class(family, head, *mixins)
    return made


def cases_or_skip(config: pytest.Config) -> dict[type[Any], type[TestCase]]:
    """The cases; without a network the tests are skipped, but in continuous integration they fail."""
    try:
        return make_cases(config.cache.mkdir("transformers-suite"))
    except fetch.NoSuiteError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


def runs(head: type[Any], settings: str, test: str) -> bool:
    """Every head in blocks; short inputs, where heads have nothing of their own, on some."""
    if settings == "short":
        return head.__name__.endswith(HEADS_OF_SHORT)
    return not test.startswith(ONLY_SHORT)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    made = cases_or_skip(metafunc.config)
    metafunc.parametrize(
        ("head", "case", "test", "settings"),
        [
            pytest.param(head, case, test, settings, id=f"{head.__name__}-{settings}-{test}")
            for head, case in made.items()
            for settings in SETTINGS
            for test in cases.test_names(case)
            if runs(head, settings, test)
        ],
    )


def outcome(case: type[TestCase], test: str) -> Exception | None:
    """What a test fails by; None: it passes. Skips are passed on."""
    transformers.set_seed(0)
    try:
        case(test).debug()
    except (SkipTest, pytest.skip.Exception) as skipped:
        pytest.skip(f"the peer's own: {skipped}")
    except Exception as error:
        return error
    return None


@pytest.mark.filterwarnings("ignore")
def test_what_passes_unpatched_passes_patched(
    head: type[Any], case: type[TestCase], test: str, settings: str
) -> None:
    reason = reason_for(head.__name__, test)
    classes = {cls for _, cls in HEADS}
    with every_model_patched(classes, **COMMON, **SETTINGS[settings]) as patched:
        failure = outcome(case, test)
    if failure is None:
        assert reason is None, f"passes patched, but is listed as an exception: {reason}"
        if not patched.count:
            assert test not in ALWAYS_COMPARED
            pytest.skip("builds no model")
    else:
        unpatched_failure = outcome(case, test)
        if unpatched_failure is not None:
            assert test not in ALWAYS_COMPARED
            pytest.skip(f"fails unpatched too: {unpatched_failure!r:.200}")
        if reason is None:
            raise failure
        pytest.xfail(reason)


def test_every_exception_is_one_of_a_test_that_runs(pytestconfig: pytest.Config) -> None:
    """Those that run and pass are found above; this finds those that no longer exist."""
    made = cases_or_skip(pytestconfig)
    run = [(head.__name__, test) for head, case in made.items() for test in cases.test_names(case)]
    for exception in EXCEPTIONS:
        assert any(exception.covers(head, test) for head, test in run), exception
