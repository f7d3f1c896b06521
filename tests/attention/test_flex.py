"""FlexAttention against the oracle, and the choice of a backend.

Compiling takes seconds: most tests share one configuration (heads, head size, dtype), so that the
file compiles a handful of times. There is no backward on a CPU, so a gradient by flex is tested
nowhere here; the fallback from it is.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lsg_patch.attention.keys import Keys
from torch import Tensor

import lsg_patch
from lsg_patch.attention import Geometry, lsg_attention
from lsg_patch.attention.backends import auto, dense, flex
from lsg_patch.attention.backends.flex import Call
from lsg_patch.attention.blocks import Blocks
from tests.models import ids_like, right_padded, run, tiny_model
from tests.oracle import oracle_attention

TYPES = ["norm", "pooling", "lsh", "stride", "block_stride", "bos_pooling", "none"]
BATCH, HEADS, HEAD_DIM = 2, 4, 8  # the heads of the tiny models as well
COMPILER = os.environ.get("CXX", "g++")
compiles = pytest.mark.skipif(  # a machine may lack what compiling takes; named in the reason
    flex.missing() is not None
    or shutil.which(COMPILER) is None
    or torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="FlexAttention on a CPU needs a torch that has it, a C++ compiler and AVX2",
)
# torch before 2.5 has none, which missing() says
has_flex = pytest.mark.skipif(flex.missing() is not None, reason=str(flex.missing()))


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


@pytest.fixture
def forget() -> Iterator[None]:
    """What auto has said and what failed, forgotten before and after."""
    for memory in (auto._said, auto._failed, auto._rehearsed):
        memory.clear()
    yield
    for memory in (auto._said, auto._failed, auto._rehearsed):
        memory.clear()


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
    length, num_sparse = blocks * geometry.block_size, blocks * geometry.step
    device = torch.device("cpu")
    plan = flex.plan_of(geometry, blocks, num_global, device)

    tokens = dense._seen(length, geometry, (geometry.local_window,), length, device)
    parts = [tokens.tril() if geometry.is_causal else tokens]
    if geometry.has_sparse:
        parts.append(dense._seen(length, geometry, geometry.sparse_windows, num_sparse, device))
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


@has_flex
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dropout_p": 0.1}, "no dropout, and dropout_p is 0.1"),
        ({"needs_grad": True}, "no backward on a CPU"),
        ({"dtype": torch.float64}, "not in torch.float64"),
        ({"device_type": "mps"}, "not on mps"),
        ({"is_compiling": True}, "not inside another torch.compile"),
    ],
)
def test_what_flex_cannot_run_says_why(change: dict[str, Any], reason: str) -> None:
    call = Call("cpu", torch.float32)
    assert flex.why_not(call) is None
    assert reason in str(flex.why_not(call._replace(**change)))


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
        name, why = auto.choose(Call("cuda", torch.float16), 128)
        assert name == "sdpa" and reason in why
    finally:
        flex.missing.cache_clear()


# --- the choice -----------------------------------------------------------------------------------


@has_flex
@pytest.mark.parametrize(
    ("call", "block_size", "name", "reason"),
    [
        (Call("cuda", torch.float16), 128, "flex", "half precision"),
        (Call("cuda", torch.bfloat16, needs_grad=True), 128, "flex", "half precision"),
        (Call("cuda", torch.bfloat16), 256, "flex", "half precision"),
        (Call("cuda", torch.bfloat16, needs_grad=True, dropout_p=0.1), 128, "sdpa", "dropout"),
        (Call("cuda", torch.bfloat16, is_compiling=True), 128, "sdpa", "torch.compile"),
        (Call("cuda", torch.float32), 128, "sdpa", "float32"),
        (Call("cuda", torch.bfloat16, has_bias=True), 128, "sdpa", "bias"),
        (Call("cuda", torch.bfloat16), 64, "sdpa", "blocks of 64 tokens"),
        (Call("cpu", torch.float32), 128, "sdpa", "faster than flex"),
        (Call("cpu", torch.bfloat16, needs_grad=True), 128, "sdpa", "no backward on a CPU"),
        (Call("cpu", torch.float64), 128, "sdpa", "float64"),
        (Call("mps", torch.float16), 128, "sdpa", "mps"),
    ],
)
def test_choice(call: Call, block_size: int, name: str, reason: str) -> None:
    chosen, why = auto.choose(call, block_size)
    assert chosen == name and reason in why


def test_a_call_is_described_as_it_is() -> None:
    query, key, value = _inputs(4)
    keys = Keys(key, value.requires_grad_(), torch.ones(BATCH, 1, 4, dtype=torch.bool))
    blocks = Blocks(query, keys, None, keys, Geometry(1), scale=1.0, dropout_p=0.5)
    call = Call("cpu", torch.float32, needs_grad=True, dropout_p=0.5, is_compiling=False)
    assert Call.of(blocks) == call
    with torch.no_grad():
        assert Call.of(blocks) == call._replace(needs_grad=False)


@pytest.mark.usefixtures("forget")
def test_auto_says_once_what_it_chose(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lsg_patch"):
        for _ in range(3):
            lsg_attention(*_inputs(43), block_size=8, sparse_block_size=8)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("LSG attention runs by sdpa: ")


def _messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What this package said; torch's compiler talks as well."""
    return [r.getMessage() for r in caplog.records if r.name.startswith("lsg_patch")]


def _by_flex(call: Call, block_size: int) -> tuple[str, str]:
    return "flex", "the test wants it"


@compiles
@pytest.mark.usefixtures("forget")
@torch.no_grad()
def test_auto_runs_flex_where_it_chooses_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(auto, "choose", _by_flex)
    sizes = {"block_size": 8, "sparse_block_size": 8}
    with caplog.at_level(logging.INFO, logger="lsg_patch"):
        actual = lsg_attention(*_inputs(43), **sizes)
    assert _messages(caplog) == ["LSG attention runs by flex: the test wants it"]
    assert torch.equal(actual, lsg_attention(*_inputs(43), backend="flex", **sizes))


@has_flex
@pytest.mark.usefixtures("forget")
def test_auto_falls_back_where_flex_has_no_backward(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Found before the forward, though it is the backward that fails."""
    monkeypatch.setattr(auto, "choose", _by_flex)
    monkeypatch.setattr(flex, "why_not", lambda call: None)
    tried = []
    rehearse = auto._rehearse
    monkeypatch.setattr(auto, "_rehearse", lambda *args: (tried.append(1), rehearse(*args)))
    gradients = []
    with caplog.at_level(logging.WARNING, logger="lsg_patch"):
        for backend in ("auto", "auto", "sdpa"):
            query, key, value = (x.requires_grad_() for x in _inputs(43))
            out = lsg_attention(
                query, key, value, block_size=8, sparse_block_size=8, backend=backend
            )
            out.square().sum().backward()
            gradients.append(torch.stack([query.grad, key.grad, value.grad]))
    assert torch.equal(gradients[0], gradients[2]) and torch.equal(gradients[1], gradients[2])
    assert len(tried) == 1
    (message,) = _messages(caplog)
    assert message.startswith("LSG attention runs by sdpa: flex failed, ")


@compiles
@pytest.mark.usefixtures("forget")
@torch.no_grad()
def test_auto_falls_back_where_nothing_can_be_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._inductor import config

    monkeypatch.setattr(auto, "choose", _by_flex)
    flex.compiled.cache_clear()
    inputs, sizes = _inputs(43), {"block_size": 8, "sparse_block_size": 8}
    without = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    with caplog.at_level(logging.WARNING, logger="lsg_patch"), config.patch(without):
        actual = [lsg_attention(*inputs, **sizes) for _ in range(2)]
    flex.compiled.cache_clear()
    expected = lsg_attention(*inputs, backend="sdpa", **sizes)
    assert all(torch.equal(x, expected) for x in actual)
    (message,) = _messages(caplog)
    assert "flex failed, InductorError" in message
