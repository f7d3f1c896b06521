"""The smallest set of tests that proves a version of transformers: each property, each family."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging as transformers_logging

import lsg_patch
from lsg_patch.memory import peak_memory
from tests.matrix.notices import deprecations
from tests.matrix.specimens import SPECIMENS, Specimen
from tests.models import (
    assert_same,
    assert_same_gradients,
    enable_checkpointing,
    right_padded,
    stand_in,
)
from tests.test_patching import assert_bitwise, fingerprint, values

SHORT, LONG = right_padded(32, 11), right_padded(90, 55)
SETTINGS: dict[str, Any] = {
    "block_size": 16,
    "sparse_block_size": 16,
    "max_position_embeddings": 200,
}
TOLERANCE = 2e-5


@pytest.fixture(params=SPECIMENS, ids=lambda specimen: specimen.family)
def specimen(request: pytest.FixtureRequest) -> Specimen:
    found: Specimen = request.param
    if found.is_absent:
        pytest.skip(f"absent: this transformers has no {found.family}")
    return found


def test_lossless_at_short_length(specimen: Specimen) -> None:
    model = specimen.model()
    expected = specimen.run(model, SHORT)
    with lsg_patch.patched(model, **SETTINGS, **stand_in(specimen.family)):
        assert_same(specimen.run(model, SHORT), expected, SHORT, TOLERANCE)


def test_a_head(specimen: Specimen) -> None:
    """Lossless at short length, and it reads what was too long for it."""
    model = specimen.model(specimen.head())
    expected = specimen.run(model, SHORT)
    with lsg_patch.patched(model, **SETTINGS, **stand_in(specimen.family)):
        assert_same(specimen.run(model, SHORT), expected, SHORT, TOLERANCE)
        for name, value in specimen.run(model, LONG).items():
            assert torch.isfinite(value).all(), name


def test_parity_with_the_golden_cases(specimen: Specimen) -> None:
    if not specimen.golden_cases:
        pytest.skip(f"the reference has no {specimen.family}: no golden cases")
    for entry in specimen.golden_cases:
        specimen.compare_with_golden(entry)


def test_no_mask_is_quadratic(specimen: Specimen) -> None:
    length = 1024
    model = lsg_patch.patch_model(specimen.model(), **{**SETTINGS, "max_position_embeddings": 1024})
    given = specimen.inputs(model, right_padded(length, length - 300))
    with torch.no_grad(), peak_memory() as memory:
        model(**given)
    assert memory.largest_numel < length**2, memory.largest_shape


def test_revert_is_exact(specimen: Specimen) -> None:
    model = specimen.model()
    outputs = specimen.run(model, SHORT)
    before, stored = fingerprint(model), values(model)
    lsg_patch.patch_model(model, **SETTINGS)
    specimen.run(model, LONG)
    lsg_patch.unpatch_model(model)
    assert fingerprint(model) == before
    assert_bitwise(values(model), stored)
    assert_bitwise(specimen.run(model, SHORT), outputs)


def test_hidden_states(specimen: Specimen) -> None:
    model = specimen.model()
    expected = specimen.hidden_states(model, SHORT)
    with lsg_patch.patched(model, **SETTINGS, **stand_in(specimen.family)):
        actual = specimen.hidden_states(model, SHORT)
    assert len(actual) == len(expected) == 3
    for got, want in zip(actual, expected, strict=True):
        real = SHORT.bool()
        torch.testing.assert_close(got[real], want[real], rtol=0, atol=TOLERANCE)


def test_gradient_checkpointing(specimen: Specimen) -> None:
    model = specimen.model()
    if not model.supports_gradient_checkpointing:
        pytest.skip(f"{specimen.family} has no gradient checkpointing in this transformers")
    runs: list[int] = []
    specimen.query(model).register_forward_hook(lambda *_: runs.append(1))
    enable_checkpointing(model, use_reentrant=False)
    gradients(specimen, model, SHORT)
    if len(runs) == 1:  # mBART before 4.31
        pytest.skip(f"{specimen.family} does not checkpoint its encoder in this transformers")
    lsg_patch.patch_model(model, **SETTINGS)
    actual = gradients(specimen, model, LONG)
    assert len(runs) == 4, "the layer runs again in backward"
    plain = lsg_patch.patch_model(specimen.model(), **SETTINGS)
    expected = gradients(specimen, plain, LONG)
    assert_same_gradients(actual, expected)


def gradients(specimen: Specimen, model: Any, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    model(**specimen.inputs(model, mask)).last_hidden_state.pow(2).sum().backward()
    model.eval()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def runs_half() -> bool:
    try:
        torch.nn.functional.layer_norm(torch.ones(1, 2, dtype=torch.float16), (2,))
    except RuntimeError:
        return False
    return True


half = pytest.mark.skipif(not runs_half(), reason="torch 2.1 has no half precision on a CPU")


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float16, marks=half), torch.bfloat16]
)
def test_save_and_load(specimen: Specimen, tmp_path: Path, dtype: torch.dtype) -> None:
    """What was saved comes back patched, bit for bit; without us it is an ordinary long model."""
    for cls in (None, specimen.head()):
        plain = specimen.model(cls)
        # 4.44 and 4.50 lose the bias of some heads, of an unpatched model as well
        plain.save_pretrained(tmp_path)
        plain = type(plain).from_pretrained(tmp_path).eval()
        model = lsg_patch.patch_model(plain, num_global_tokens=2, **SETTINGS)
        with torch.no_grad():
            lsg_patch.global_embeddings(model).add_(0.5)
        model.to(dtype).save_pretrained(tmp_path)
        loaded = lsg_patch.from_pretrained(tmp_path, torch_dtype=dtype)
        assert type(loaded) is type(model)
        assert lsg_patch.get_config(loaded) == lsg_patch.get_config(model)
        assert_bitwise(dict(loaded.named_parameters()), dict(model.named_parameters()))
        assert_bitwise(specimen.run(loaded, LONG), specimen.run(model, LONG))
        ordinary = type(model).from_pretrained(tmp_path).eval()
        assert not lsg_patch.is_patched(ordinary)
        for name, value in specimen.run(ordinary, LONG).items():
            assert torch.isfinite(value).all(), name


def test_no_deprecation_is_ours(specimen: Specimen, tmp_path: Path) -> None:
    """Whatever transformers and torch say of a patched model they say of the unpatched one too."""

    def use(model: Any) -> None:
        specimen.run(model, SHORT)
        specimen.hidden_states(model, SHORT)
        specimen.run(model, SHORT, output_attentions=True)
        gradients(specimen, model, SHORT)
        if model.supports_gradient_checkpointing:
            enable_checkpointing(model, use_reentrant=False)
            gradients(specimen, model, SHORT)
        model.save_pretrained(tmp_path)

    with deprecations() as unpatched:
        use(specimen.model())
    with deprecations() as patched:
        model = lsg_patch.patch_model(specimen.model(), **SETTINGS)
        use(model)
        lsg_patch.unpatch_model(model)
    assert patched - unpatched == set()


def test_deprecations_are_seen() -> None:
    """Warned of or logged, also again what is said once."""
    logger = transformers_logging.get_logger("transformers.models.bert")
    for _ in range(2):
        with deprecations() as found:
            warnings.warn("a", FutureWarning, stacklevel=1)
            warnings.warn("b", UserWarning, stacklevel=1)
            getattr(logger, "warning_once", logger.warning)("`x` is deprecated")
            logger.log(logging.WARNING, "c")
        assert found == {"a", "`x` is deprecated"}
