"""FlexAttention against the oracle, and the choice of a backend.

Compiling takes seconds: most tests share one configuration (heads, head size, dtype), so that the
file compiles a handful of times. Torch has no fused backward on a CPU: gradients are those of its own
dense form, which computes them from the same mask function.
"""

from __future__ import annotations

import importlib
import os
import shutil
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import lsg_patch
from lsg_patch.attention import Geometry, RelativeBias, lsg_attention
from lsg_patch.attention.backends import dense, flex
from lsg_patch.attention.blocks import Blocks, Keys
from tests.models import ids_like, right_padded, run, tiny_model
from tests.oracle import oracle_attention

TYPES = ["norm", "pooling", "lsh", "stride", "block_stride", "bos_pooling", "none"]
BATCH, HEADS, HEAD_DIM = 2, 4, 8  # the heads of the tiny models as well
COMPILER = os.environ.get("CXX", "g++")
compiles = pytest.mark.skipif(  # reason: a machine may lack a new torch, a C++ compiler or AVX2
    flex.missing() is not None
    or shutil.which(COMPILER) is None
    or torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="FlexAttention on a CPU needs a torch that has it, a C++ compiler and AVX2",
)
NO_FLEX = flex.missing()  # in words, such as that torch before 2.5 has none
has_flex = pytest.mark.skipif(  # reason: torch before 2.5 has no FlexAttention
    NO_FLEX is not None, reason=f"flex cannot run here: {NO_FLEX}"
)


def _inputs(rows: int, head_dim: int = HEAD_DIM, batch: int = BATCH, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(3, batch, HEADS, rows, head_dim, generator=generator))


def _padding(tokens: int, seed: int = 0) -> Tensor:
    """Holes everywhere, and the last third of one row."""
    mask = torch.rand(BATCH, tokens, generator=torch.Generator().manual_seed(seed)) > 0.2
    mask[0, 2 * tokens // 3 :] = False
    return mask


@torch.no_grad()
def _assert_equals_the_oracle(inputs: list[Tensor], **arguments: Any) -> None:
    actual = lsg_attention(*inputs, backend="flex", **arguments)
    in_double = [x.double() for x in inputs]
    expected = oracle_attention(*in_double, **arguments)
    assert torch.isfinite(actual).all()
    sees_key = expected.sees_key
    if arguments.get("is_causal"):
        sees_key[:, : arguments["num_global_tokens"]] = False  # not defined by the oracle
    rows, positions = sees_key.nonzero(as_tuple=True)
    error = (actual - expected.output)[rows, :, positions].abs()
    assert error.numel() == 0 or error.max() < 1e-5, (error.max(), arguments)


# --- the same numbers -----------------------------------------------------------------------------


@compiles
@pytest.mark.parametrize("padded", [False, True], ids=["all seen", "padded"])
@pytest.mark.parametrize("sparsity_type", TYPES)
def test_equals_the_oracle(sparsity_type: str, padded: bool) -> None:
    """Odd lengths, with 0 to 3 global tokens, blocks smaller than flex's tiles and of their size."""
    for num_global, tokens, block_size in ((0, 43, 8), (1, 131, 16), (2, 300, 32), (3, 301, 128)):
        arguments: dict[str, Any] = {}
        if sparsity_type == "lsh":
            sizes = (block_size // 2, block_size // 4)
            generator = torch.Generator().manual_seed(0)
            arguments["lsh_projections"] = [
                torch.randn(HEADS, HEAD_DIM, n, generator=generator) for n in sizes
            ]
        _assert_equals_the_oracle(
            _inputs(num_global + tokens),
            padding_mask=_padding(tokens) if padded else None,
            block_size=block_size,
            sparse_block_size=block_size,
            sparsity_factor=2,
            sparsity_type=sparsity_type,
            num_global_tokens=num_global,
            **arguments,
        )


@compiles
@settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=30,
    suppress_health_check=list(HealthCheck),
)
@given(st.data())
def test_equals_the_oracle_for_all_sizes(data: st.DataObject) -> None:
    """Windows that are cut by tiles in every way, causal and not."""
    factor = data.draw(st.sampled_from([1, 2, 3, 4]))
    first_token_global = data.draw(st.booleans())
    num_global = 0 if first_token_global else data.draw(st.integers(0, 3))
    tokens = data.draw(st.integers(20, 250))
    mask = _padding(tokens) if data.draw(st.booleans()) else None
    if first_token_global and mask is not None:
        mask[:, 0] = True
    _assert_equals_the_oracle(
        _inputs(num_global + tokens),
        padding_mask=mask,
        block_size=factor * data.draw(st.integers(1, 40)),
        sparse_block_size=factor * data.draw(st.integers(0, 40)),
        sparsity_factor=factor,
        sparsity_type=data.draw(st.sampled_from(["stride", "pooling"])),
        num_global_tokens=num_global,
        first_token_global=first_token_global,
        is_causal=data.draw(st.booleans()),
    )


@compiles
@torch.no_grad()
def test_one_row_of_wide_heads_at_the_default_sizes_equals_dense() -> None:
    inputs = _inputs(1 + 901, head_dim=64, batch=1)
    arguments: dict[str, Any] = {"num_global_tokens": 1, "scale": 0.1}
    actual = lsg_attention(*inputs, backend="flex", **arguments)
    expected = lsg_attention(*inputs, backend="dense", **arguments)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@compiles
def test_twenty_lengths_compile_twice_at_most() -> None:
    flex.compiled.cache_clear()
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    for tokens in range(40, 440, 20):
        _assert_equals_the_oracle(
            _inputs(1 + tokens),
            padding_mask=_padding(tokens),
            block_size=16,
            sparse_block_size=16,
            sparsity_type="stride",
            num_global_tokens=1,
        )
    assert 1 <= counters["unique_graphs"] - before <= 2


@compiles
def test_a_patched_model_gives_what_it_gives_by_sdpa() -> None:
    mask = right_padded(75, 40)
    ids = ids_like(mask, "bert")
    outputs = []
    for backend in ("sdpa", "flex"):
        model = tiny_model("bert")
        with lsg_patch.patched(
            model, 8, sparse_block_size=8, backend=backend, max_position_embeddings=128
        ):
            outputs.append(run(model, ids, mask)["last_hidden_state"][mask.bool()])
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-4)


# --- gradients ------------------------------------------------------------------------------------


@pytest.fixture
def unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention that is not compiled, and differentiable on a CPU, which it refuses by default."""
    module = importlib.import_module("torch.nn.attention.flex_attention")
    monkeypatch.setattr(module, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "compiled", lambda *configuration: flex._attend)
    monkeypatch.setattr(Blocks, "needs_grad", False)  # for why_not, which is tested below


@has_flex
@pytest.mark.usefixtures("unfused")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("padded", [False, True], ids=["all seen", "padded"])
@pytest.mark.parametrize("sparsity_type", TYPES)
def test_gradients_equal_those_of_the_oracle(
    sparsity_type: str, padded: bool, is_causal: bool
) -> None:
    arguments: dict[str, Any] = {
        "padding_mask": _padding(75) if padded else None,
        "block_size": 16,
        "sparse_block_size": 16,
        "sparsity_type": sparsity_type,
        "num_global_tokens": 2,
        "is_causal": is_causal,
    }
    if sparsity_type == "lsh":
        generator = torch.Generator().manual_seed(0)
        arguments["lsh_projections"] = [
            torch.randn(HEADS, 16, n, generator=generator) for n in (8, 4)
        ]
    inputs = [x.double().requires_grad_() for x in _inputs(2 + 75, head_dim=16)]
    expected = oracle_attention(*inputs, **arguments)
    weights = torch.rand(
        expected.output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double
    )
    weights = weights * expected.sees_key[:, None, :, None]
    if is_causal:
        weights[:, :, :2] = 0  # the oracle does not define these
    grads = torch.autograd.grad((expected.output * weights).sum(), inputs)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        own = [x.detach().to(dtype).requires_grad_() for x in inputs]
        if dtype == torch.bfloat16 and sparsity_type in ("norm", "lsh"):
            continue  # reason: what is rounded may choose other tokens
        out = lsg_attention(*own, backend="flex", **arguments)
        actual = torch.autograd.grad((out.double() * weights).sum(), own)
        for got, want in zip(actual, grads, strict=True):
            torch.testing.assert_close(
                got.double(), want, rtol=0, atol=tolerance * float(want.abs().max())
            )


# --- who sees whom --------------------------------------------------------------------------------


GEOMETRIES = st.builds(
    lambda factor, block, sparse, causal: Geometry(factor * block, factor * sparse, factor, causal),
    st.integers(1, 4),
    st.integers(1, 50),
    st.integers(0, 50),
    st.booleans(),
)


@has_flex
@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(GEOMETRIES, st.integers(3, 9), st.integers(0, 3))
def test_mask_function_and_tiles_hold_what_the_geometry_says(
    geometry: Geometry, blocks: int, num_global: int
) -> None:
    """Every pair that is seen, and no other, by tiles that hold a seen pair and only those."""
    length, num_sparse = blocks * geometry.block_size, blocks * geometry.sparse_per_block
    device = torch.device("cpu")
    plan = flex.plan_of(geometry, blocks, num_global, device)

    mask = torch.ones(1, 1, length)
    tokens = dense._seen(mask, length, geometry, (geometry.local_window,))
    parts = [tokens.tril() if geometry.is_causal else tokens]
    if geometry.has_sparse:
        mask = torch.ones(1, 1, num_sparse)
        parts.append(dense._seen(mask, length, geometry, geometry.sparse_windows))
    parts.append(torch.ones(length, num_global, dtype=torch.bool))
    expected = torch.zeros(plan.query_tiles * flex.QUERY_TILE, sum(plan.sizes), dtype=torch.bool)
    at = 0
    for part, size in zip(parts, plan.sizes, strict=True):
        expected[:length, at : at + part.shape[1]] = part
        at += size

    everything = torch.ones(1, 1, expected.shape[1], dtype=torch.bool)
    seen = flex._mask_function(everything, plan.begin, plan.end)
    zero, queries = torch.tensor(0), torch.arange(length)[:, None]
    actual = seen(zero, zero, queries, torch.arange(expected.shape[1]))
    assert torch.equal(actual, expected[:length])

    tile = flex.KEY_TILE["cpu"]
    in_tiles = expected.view(plan.query_tiles, flex.QUERY_TILE, -1, tile).any(3).any(1)
    listed = plan.block_mask.to_dense()[0, 0].bool()
    assert not (in_tiles & ~listed).any()
    assert listed.sum(dim=1).max() <= in_tiles.sum(dim=1).max() + 2 * len(parts)
    # a backward on a GPU goes by the same tiles, those of queries for each of keys
    of_keys = torch.zeros_like(listed.T)
    numbers, indices = plan.block_mask.q_num_blocks[0, 0], plan.block_mask.q_indices[0, 0]
    for row, number, index in zip(of_keys, numbers, indices, strict=True):
        row[index[:number].long()] = True
    assert torch.equal(of_keys, listed.T)


@has_flex
def test_tiles_grow_with_the_length_and_plans_are_kept() -> None:
    geometry, device = Geometry(128, 128, 2), torch.device("cpu")
    few, many = (flex.plan_of(geometry, blocks, 1, device) for blocks in (32, 64))
    assert few.block_mask.kv_num_blocks.max() == many.block_mask.kv_num_blocks.max() == 11
    assert flex.plan_of(geometry, 32, 1, device) is few
    assert flex.plan_of.cache_info().maxsize == 32


@has_flex
def test_a_plan_made_in_inference_mode_can_be_saved_for_a_backward() -> None:
    flex.plan_of.cache_clear()
    with torch.inference_mode():
        plan = flex.plan_of(Geometry(8, 8, 2), 5, 1, torch.device("cpu"))
    tensors = (plan.begin, plan.end, plan.block_mask.kv_indices, plan.block_mask.q_indices)
    assert not any(x.is_inference() for x in tensors)


# --- what flex cannot run -------------------------------------------------------------------------


def _blocks(dtype: torch.dtype = torch.float32, device: str = "cpu", **changes: Any) -> Blocks:
    query, key, value = (x.to(device, dtype) for x in _inputs(4))
    keys = Keys(key, value, torch.ones(BATCH, 1, 4, dtype=torch.bool, device=device))
    return Blocks(query, keys, None, keys, Geometry(1), scale=1.0)._replace(**changes)


@has_flex
@pytest.mark.parametrize(
    ("blocks", "reason"),
    [
        (_blocks(dropout_p=0.1), "no dropout, and dropout_p is 0.1"),
        (_blocks(query=_inputs(4)[0].requires_grad_()), "no backward on a CPU"),
        (_blocks(torch.float64), "not in torch.float64"),
        (_blocks(device="meta"), "not on meta"),
        (_blocks(bias=RelativeBias(torch.ones(HEADS, 3))), "no bias by distance"),
    ],
    ids=["dropout", "gradients", "dtype", "device", "bias"],
)
def test_what_flex_cannot_run_says_why(blocks: Blocks, reason: str) -> None:
    assert flex.why_not(_blocks()) is None
    assert reason in str(flex.why_not(blocks))


@has_flex
def test_flex_does_not_run_inside_a_transform() -> None:
    reasons = []

    def function(query: Tensor) -> Tensor:
        reasons.append(flex.why_not(blocks))
        return query

    blocks = _blocks()
    torch.func.vmap(function)(blocks.query[None])
    assert "not inside another torch.compile" in str(reasons)


@has_flex
def test_gradients_are_asked_for_where_autograd_is_on() -> None:
    blocks = _blocks()
    assert not blocks.needs_grad
    blocks.tokens.value.requires_grad_()
    assert blocks.needs_grad
    with torch.no_grad():
        assert not blocks.needs_grad


@has_flex
def test_forced_flex_is_an_error_where_it_cannot_run() -> None:
    inputs = _inputs(43)
    sizes = {"block_size": 8, "sparse_block_size": 8, "backend": "flex"}
    with pytest.raises(ValueError, match="backend='flex' cannot run here: it has no dropout"):
        lsg_attention(*inputs, dropout_p=0.1, **sizes)
    with pytest.raises(ValueError, match="not in torch.float64"):
        lsg_attention(*(x.double() for x in inputs), **sizes)
    with pytest.raises(ValueError, match="no backward on a CPU"):
        lsg_attention(inputs[0].requires_grad_(), *inputs[1:], **sizes)
    model = lsg_patch.patch_model(tiny_model("bert"), 8, sparse_block_size=8, backend="flex")
    mask = right_padded(43)
    with pytest.raises(ValueError, match="no backward on a CPU"):
        model(ids_like(mask, "bert"), mask)


def test_a_torch_without_flex_is_told_before_anything_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reason = "this torch has no torch.nn.attention.flex_attention"
    monkeypatch.setattr(flex, "find_spec", lambda name: None)
    flex.missing.cache_clear()
    try:
        with pytest.raises(ValueError, match=f"backend='flex' cannot run here: {reason}"):
            lsg_attention(*_inputs(3), backend="flex")
        model = tiny_model("bert")
        with pytest.raises(ValueError, match=f"backend='flex' cannot run here: {reason}"):
            lsg_patch.patch_model(model, backend="flex")
        assert not lsg_patch.is_patched(model)
        lsg_attention(*_inputs(43), block_size=8, sparse_block_size=8)
    finally:
        flex.missing.cache_clear()


# --- the choice -----------------------------------------------------------------------------------


def test_auto_is_sdpa() -> None:
    inputs, sizes = _inputs(43), {"block_size": 8, "sparse_block_size": 8}
    assert torch.equal(
        lsg_attention(*inputs, **sizes), lsg_attention(*inputs, **sizes, backend="sdpa")
    )
