"""`lsg_attention` with a bias by distance: the oracle's numbers, the same memory, any length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lsg_patch.attention import RelativeBias, lsg_attention
from lsg_patch.memory import peak_memory
from tests.attention.test_functional import (
    BACKENDS,
    LOW_PRECISION,
    TOLERANCE,
    TYPES,
    Case,
    Inputs,
    _cases,
    _error,
    _error_where_defined,
    _fixed_mask,
    _fixed_projections,
    _inputs,
)
from tests.oracle import oracle_attention

HEADS, TOKENS = 2, 43


def _table(heads: int, reach: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(heads, 2 * reach + 1, generator=generator, dtype=torch.float64).to(dtype)


def _positions(*of_globals: int, tokens: int = TOKENS) -> Tensor:
    """(1, N): of global rows, and of tokens that begin at 0."""
    return torch.tensor([[*of_globals, *range(tokens)]])


@pytest.mark.parametrize(
    ("first_token_global", "examples"), [(False, 100), (True, 40)], ids=["globals", "first_token"]
)
@pytest.mark.parametrize("sparsity_type", TYPES)
def test_equals_the_oracle(sparsity_type: str, first_token_global: bool, examples: int) -> None:
    """Outputs and gradients, that of the bias too, both backends, over all sizes."""

    @settings(
        derandomize=True,
        deadline=None,
        database=None,
        max_examples=examples,
        suppress_health_check=list(HealthCheck),
    )
    @given(_cases(sparsity_type, first_token_global), st.integers(0, 40), st.data())
    def check(case: Any, reach: int, data: st.DataObject) -> None:
        g, is_causal = case.settings["num_global_tokens"], case.settings["is_causal"]
        places = _places(data.draw, case)
        inputs = [x.clone().requires_grad_() for x in case.inputs]
        table = _table(inputs[0].shape[1], reach).requires_grad_()
        variables = [*inputs, table]
        expected, sees_key = oracle_attention(
            *inputs, **case.settings, bias_by_distance=table, places=places
        )
        if is_causal:
            sees_key[:, :g] = False
        weights = _inputs(*expected.shape, seed=1).query * sees_key[:, None, :, None]
        expected_gradients = torch.autograd.grad((expected * weights).sum(), variables)

        bias = RelativeBias(table, None if places is None else torch.tensor(places))
        for backend in BACKENDS:
            arguments = {**case.settings, "relative_bias": bias, "backend": backend}
            actual = lsg_attention(*inputs, **arguments)
            assert actual.isfinite().all()
            assert _error_where_defined(actual, expected, sees_key) <= TOLERANCE, backend
            gradients = torch.autograd.grad((actual * weights).sum(), variables)
            for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
                assert _error(gradient, expected_gradient) <= 10 * TOLERANCE, backend
            with torch.no_grad():  # the way without gradients is another one
                actual = lsg_attention(*inputs, **arguments)
            assert _error_where_defined(actual, expected, sees_key) <= TOLERANCE, backend

    check()


def _places(draw: Any, case: Case) -> list[list[int]] | None:
    """Of each batch row: global tokens anywhere; tokens one after the other, where blocks are used."""
    batch, _, rows, _ = case.inputs.query.shape
    g = case.settings["num_global_tokens"]
    if g == 0 and draw(st.booleans()):
        return None
    somewhere = st.integers(-50, 120)
    if rows - g <= 2 * case.settings["block_size"]:
        return [[draw(somewhere) for _ in range(rows)] for _ in range(batch)]
    places = []
    for _ in range(batch):
        start = draw(somewhere)
        tokens = list(range(start, start + rows - g))
        places.append([*(draw(somewhere) for _ in range(g)), *tokens])
    return places


SETTINGS: dict[str, Any] = {
    "block_size": 8,
    "sparse_block_size": 8,
    "sparsity_factor": 2,
    "num_global_tokens": 2,
}


@pytest.mark.parametrize("reach", [5, 20])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sparsity_type", TYPES)
def test_gradcheck(sparsity_type: str, backend: str, reach: int) -> None:
    """The derivative by the bias, where sparse tokens are in its reach and where not."""
    inputs = _inputs(1, HEADS, 2 + TOKENS, 2)

    def function(table: Tensor) -> Tensor:
        return lsg_attention(
            *inputs,
            _fixed_mask()[:1],
            **SETTINGS,
            sparsity_type=sparsity_type,
            seed=0,
            relative_bias=RelativeBias(table, _positions(-1, 30)),
            backend=backend,
        )

    assert torch.autograd.gradcheck(function, [_table(HEADS, reach).requires_grad_()])


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sparsity_type", TYPES)
def test_low_precision(sparsity_type: str, backend: str, dtype: torch.dtype) -> None:
    """A bias in full precision suits inputs of another one."""
    inputs = _inputs(2, HEADS, TOKENS + 2, 4, dtype=dtype)
    table = _table(HEADS, 20, dtype=torch.float32)
    arguments = {
        **SETTINGS,
        "padding_mask": _fixed_mask(),
        "sparsity_type": sparsity_type,
        "lsh_projections": _fixed_projections(),
    }
    positions = _positions(0, 9)
    bias = RelativeBias(table, positions)
    actual = lsg_attention(*inputs, **arguments, relative_bias=bias, backend=backend)
    assert actual.dtype == dtype and actual.isfinite().all()
    exact = oracle_attention(
        *(x.double() for x in inputs),
        **arguments,
        bias_by_distance=table.double(),
        places=positions.tolist() * 2,
    ).output
    errors = (actual.double() - exact)[:, :, 2:].abs().amax(dim=-1)
    assert float(errors.quantile(0.75)) < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("sparsity_type", TYPES)
@pytest.mark.parametrize("reach", [8, 128])
@pytest.mark.parametrize("trains", [False, True])
def test_memory_is_linear(sparsity_type: str, reach: int, trains: bool) -> None:
    used = {}
    for length in (2048, 8192):
        inputs = Inputs(*(x.requires_grad_(trains) for x in _inputs(1, HEADS, 1 + length, 4)))
        bias = RelativeBias(_table(HEADS, reach), _positions(0, tokens=length))
        with peak_memory() as memory:
            lsg_attention(
                *inputs,
                block_size=16,
                sparse_block_size=16,
                sparsity_type=sparsity_type,
                num_global_tokens=1,
                relative_bias=bias,
            ).sum()
        used[length] = memory.peak_bytes
        assert memory.largest_numel < length**2 / 4, memory.largest_shape
    assert used[8192] <= 4.4 * used[2048]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_of_one_number_changes_nothing(backend: str) -> None:
    inputs = _inputs(2, HEADS, TOKENS + 2, 4)
    arguments = {**SETTINGS, "padding_mask": _fixed_mask(), "backend": backend}
    bias = RelativeBias(torch.full((HEADS, 1), 3.0), _positions(0, 1))
    actual = lsg_attention(*inputs, **arguments, relative_bias=bias)
    assert _error(actual, lsg_attention(*inputs, **arguments)) <= TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [12, TOKENS])
def test_an_empty_batch(tokens: int, backend: str) -> None:
    bias = RelativeBias(_table(HEADS, 20), _positions(0, 1, tokens=tokens))
    output = lsg_attention(
        *_inputs(0, HEADS, tokens + 2, 4), **SETTINGS, relative_bias=bias, backend=backend
    )
    assert output.shape == (0, HEADS, tokens + 2, 4)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (RelativeBias(torch.ones(3, 5), _positions(0, 1)), r"table must be \(H, 2 \* m \+ 1\)"),
        (RelativeBias(torch.ones(HEADS, 4), _positions(0, 1)), "table must be"),
        (RelativeBias(torch.ones(5), _positions(0, 1)), "table must be"),
        (
            RelativeBias(torch.ones(HEADS, 5), _positions(0)),
            r"positions must be \(B, N\) = \(2, 45\)",
        ),
        (RelativeBias(torch.ones(HEADS, 5)), "positions is needed with num_global_tokens=2"),
    ],
    ids=["heads", "even", "dimensions", "positions", "no positions"],
)
def test_errors(bias: RelativeBias, message: str) -> None:
    with pytest.raises(ValueError, match=f"relative_bias.{message}"):
        lsg_attention(*_inputs(2, HEADS, TOKENS + 2, 4), **SETTINGS, relative_bias=bias)
