"""The attention function, and the oracle that the other tests trust, against the golden numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lsg_patch.attention import lsg_attention
from tests.golden import Entry, entries, tensors
from tests.oracle import oracle_attention

CASES = entries("attention_inner") + entries("attention_layer")
CASE_NAMES = [entry["name"] for entry in CASES]


def _arguments(entry: Entry, stored: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `lsg_attention` (and of the oracle) for one case."""
    arguments: dict[str, Any] = {
        "query": stored["q"].to(dtype),
        "key": stored["k"].to(dtype),
        "value": stored["v"].to(dtype),
        "padding_mask": stored["attention_mask"].bool(),
        "block_size": entry["block_size"],
        "sparsity_factor": entry["sparsity_factor"],
        "sparsity_type": entry["sparsity_type"] or "none",
        "is_causal": entry["is_causal"],
    }
    if entry["kind"] == "attention_inner":
        arguments["sparse_block_size"] = entry["sparse_block_size"]
        arguments["num_global_tokens"] = entry["num_global_tokens"]
        arguments["lsh_num_pre_rounds"] = entry["lsh_num_pre_rounds"]
    else:
        arguments["sparse_block_size"] = entry["block_size"]
        arguments["first_token_global"] = entry["compute_global_attention"]
    drawn = sorted(
        (name for name in stored if name.startswith("lsh.randn.")),
        key=lambda name: int(name.rsplit(".", 1)[1]),
    )
    if drawn:
        # (1, heads, 1, head_dim, n) in the reference.
        arguments["lsh_projections"] = [stored[name][0, :, 0].to(dtype) for name in drawn]
    return arguments


def _expected(entry: Entry, stored: dict[str, Tensor]) -> Tensor:
    out = stored["out"]
    if entry["kind"] == "attention_layer":
        return out
    # Heads are concatenated there.
    return out.unflatten(-1, (entry["heads"], entry["head_dim"])).transpose(1, 2)


def _error(entry: Entry, actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the rows that count: no padding, and no global rows if causal."""
    assert actual.shape == expected.shape
    g = entry.get("num_global_tokens", 0)
    first = g if entry["is_causal"] else 0
    differences = [
        (actual[row, :, first : g + valid].double() - expected[row, :, first : g + valid].double())
        for row, valid in enumerate(entry["valid_lengths"])
    ]
    return max(float(difference.abs().max()) for difference in differences)


def _tolerance(entry: Entry, dtype: torch.dtype) -> float:
    # No tol_fp64: the reference could run the case in float32 only.
    if dtype == torch.float64 and entry["tol_fp64"] is not None:
        return entry["tol_fp64"]
    return entry["tol_fp32"]


def test_golden_cases_are_there() -> None:
    """An empty index would let everything below pass."""
    assert len(entries("attention_inner")) == 48
    assert len(entries("attention_layer")) == 25
    assert len(entries("model")) == 79
    assert len(entries("conversion")) == 14


@pytest.mark.parametrize("backend", ["dense", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("entry", CASES, ids=CASE_NAMES)
def test_attention(entry: Entry, dtype: torch.dtype, backend: str) -> None:
    """Every golden attention case within its own tolerance."""
    stored = tensors(entry)
    actual = lsg_attention(**_arguments(entry, stored, dtype), backend=backend)
    assert actual.dtype == dtype
    assert _error(entry, actual, _expected(entry, stored)) <= _tolerance(entry, dtype)


@pytest.mark.parametrize("entry", CASES, ids=CASE_NAMES)
def test_oracle(entry: Entry) -> None:
    """The oracle reproduces the same cases."""
    stored = tensors(entry)
    output, sees_key = oracle_attention(**_arguments(entry, stored, torch.float64))
    assert sees_key.all()
    assert _error(entry, output, _expected(entry, stored)) <= _tolerance(entry, torch.float64)
