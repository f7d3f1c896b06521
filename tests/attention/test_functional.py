"""`lsg_attention` against the dense oracle, and what it promises beyond numbers."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import lsg_patch
from lsg_patch.attention import lsg_attention
from tests.oracle import oracle_attention

TYPES = ["norm", "pooling", "lsh", "stride", "block_stride", "bos_pooling", "none"]
BACKENDS = ["dense", "sdpa"]
LOW_PRECISION = [torch.float16, torch.bfloat16]
TOLERANCE = 1e-10  # float64


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor


def _inputs(
    batch: int,
    heads: int,
    length: int,
    head_dim: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    """Normal q, k, v; continuous draws, so that no two norms tie."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(3, batch, heads, length, head_dim, generator=generator, dtype=torch.float64)
    return Inputs(*drawn.to(dtype))


def _projections(
    heads: int,
    head_dim: int,
    *,
    block_size: int,
    sparse_block_size: int,
    sparsity_factor: int,
    pre_rounds: int,
    seed: int = 0,
) -> list[Tensor]:
    """One projection a round; a final round of one bucket has (H, D, 0)."""
    generator = torch.Generator().manual_seed(seed)
    chunk = math.gcd(block_size, min(block_size, sparse_block_size))
    sizes = [chunk] * pre_rounds + [chunk // sparsity_factor]
    return [
        torch.randn(heads, head_dim, size // 2, generator=generator, dtype=torch.float64)
        for size in sizes
    ]


# A long input with windows on both sides, holes and right padding in the mask: the tests of fixed
# size start from these.
TOKENS = 43
SETTINGS: dict[str, Any] = {
    "block_size": 8,
    "sparse_block_size": 8,
    "sparsity_factor": 2,
    "num_global_tokens": 2,
}
HEADS, HEAD_DIM = 2, 4


def _fixed_projections() -> list[Tensor]:
    return _projections(
        HEADS, HEAD_DIM, block_size=8, sparse_block_size=8, sparsity_factor=2, pre_rounds=1
    )


def _fixed_mask(batch: int = 2) -> Tensor:
    mask = torch.ones(batch, TOKENS, dtype=torch.bool)
    mask[0, 30:] = False
    mask[0, [5, 9, 10, 11, 12, 13, 14, 15]] = False
    mask[1, 20] = False
    return mask


def _error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).detach().abs().max()) if actual.numel() else 0.0


def _error_where_defined(actual: Tensor, expected: Tensor, sees_key: Tensor) -> float:
    """`_error` over the rows that see a key."""
    rows, positions = sees_key.nonzero(as_tuple=True)
    return _error(actual[rows, :, positions], expected[rows, :, positions])


def test_public_name() -> None:
    """The function is the package's own, too."""
    assert lsg_patch.lsg_attention is lsg_attention


# --- (a) the same numbers as the oracle -----------------------------------------------------------


class Case(NamedTuple):
    """One drawn call."""

    inputs: Inputs
    settings: dict[str, Any]


PADDINGS = ["none", "right", "left", "both", "holes", "block", "all", "some_all"]


@st.composite
def _padding_masks(draw: st.DrawFn, batch: int, tokens: int) -> Tensor | None:
    """Padding anywhere: None, ends, holes, a whole stretch, whole rows."""
    kind = draw(st.sampled_from(PADDINGS))
    if kind == "none":
        return None
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    for row in range(batch):
        start, end = sorted(draw(st.tuples(st.integers(0, tokens), st.integers(0, tokens))))
        if kind in ("right", "both"):
            mask[row, end:] = False
        if kind in ("left", "both"):
            mask[row, :start] = False
        if kind == "block":
            mask[row, start:end] = False
        if kind == "holes":
            mask[row] = torch.rand(tokens, generator=generator) < draw(st.floats(0.05, 0.95))
        if kind == "all" or (kind == "some_all" and draw(st.booleans())):
            mask[row] = False
    return mask if draw(st.booleans()) else mask.long()


@st.composite
def _cases(draw: st.DrawFn, sparsity_type: str, first_token_global: bool) -> Case:
    block_size = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]))
    factor = draw(st.sampled_from([f for f in range(1, block_size + 1) if block_size % f == 0]))
    if first_token_global and sparsity_type == "bos_pooling" and factor == 1:
        block_size = factor = max(block_size, 2)  # factor 1 has its own test
    # Most cases are to reach the sparse windows: 0 switches them off.
    multiples = st.integers(1, max(1, 24 // factor)).map(lambda n: n * factor)
    sparse_block_size = draw(st.one_of(multiples, multiples, multiples, st.just(0)))
    # Between one token and nine blocks.
    tokens = draw(
        st.one_of(
            st.integers(1, 100),
            st.integers(2 * block_size + 1, max(9 * block_size, 20)).map(lambda t: min(t, 100)),
        )
    )
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    head_dim = draw(st.sampled_from([1, 2, 3, 4]))
    g = 0 if first_token_global else draw(st.integers(0, 3))
    pre_rounds = draw(st.integers(0, 2))
    mask = draw(_padding_masks(batch, tokens))
    if first_token_global and mask is not None:
        mask[:, 0] = 1  # a masked token 0 has its own test
    seed = draw(st.integers(0, 2**20))

    arguments: dict[str, Any] = {
        "padding_mask": mask,
        "block_size": block_size,
        "sparse_block_size": sparse_block_size,
        "sparsity_factor": factor,
        "sparsity_type": sparsity_type,
        "num_global_tokens": g,
        "first_token_global": first_token_global,
        "is_causal": draw(st.booleans()),
        "lsh_num_pre_rounds": pre_rounds,
        "scale": draw(st.sampled_from([None, 0.7])),
    }
    if sparsity_type in ("norm", "lsh") and draw(st.booleans()):
        arguments["choose_by"] = _inputs(batch, heads, g + tokens, head_dim, seed + 1).key
    if sparsity_type == "lsh" and sparse_block_size > 0:
        arguments["lsh_projections"] = _projections(
            heads,
            head_dim,
            block_size=block_size,
            sparse_block_size=sparse_block_size,
            sparsity_factor=factor,
            pre_rounds=pre_rounds,
            seed=seed,
        )
    return Case(_inputs(batch, heads, g + tokens, head_dim, seed), arguments)


@pytest.mark.parametrize(
    ("first_token_global", "examples"), [(False, 200), (True, 80)], ids=["globals", "first_token"]
)
@pytest.mark.parametrize("sparsity_type", TYPES)
def test_equals_the_oracle(sparsity_type: str, first_token_global: bool, examples: int) -> None:
    """Outputs and gradients, both backends, over all sizes that are allowed."""

    @settings(
        derandomize=True,
        deadline=None,
        database=None,
        max_examples=examples,
        suppress_health_check=list(HealthCheck),
    )
    @given(_cases(sparsity_type, first_token_global))
    def check(case: Case) -> None:
        g, is_causal = case.settings["num_global_tokens"], case.settings["is_causal"]
        inputs = Inputs(*(x.clone().requires_grad_() for x in case.inputs))
        expected, sees_key = oracle_attention(*inputs, **case.settings)
        # Global rows are not defined in causal mode; rows that see nothing are finite, no more.
        if is_causal:
            sees_key[:, :g] = False
        weights = _inputs(*expected.shape, seed=1).query * sees_key[:, None, :, None]
        expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs)

        for backend in BACKENDS:
            actual = lsg_attention(*inputs, **case.settings, backend=backend)
            assert actual.isfinite().all()
            assert _error_where_defined(actual, expected, sees_key) <= TOLERANCE, backend
            gradients = torch.autograd.grad((actual * weights).sum(), inputs)
            for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
                assert _error(gradient, expected_gradient) <= 10 * TOLERANCE, backend

    check()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kept", [1, 7, 40])
@pytest.mark.parametrize("new", [1, 3, 16, 37])
@pytest.mark.parametrize("first", ["none", "globals", "first_token"])
def test_keys_that_were_kept(backend: str, kept: int, new: int, first: str) -> None:
    """The last queries over all keys: full causal attention, beyond two blocks as well."""
    g, tokens = {"globals": 2}.get(first, 0), kept + new
    inputs = _inputs(2, HEADS, g + tokens, HEAD_DIM)
    mask = torch.ones(2, tokens)
    mask[0, : kept // 2], mask[1, kept // 2] = 0, 0
    if first == "first_token":
        mask[:, 0] = 1
    how: dict[str, Any] = {"num_global_tokens": g, "first_token_global": first == "first_token"}
    how |= {"padding_mask": mask, "is_causal": True}
    expected, sees_key = oracle_attention(*inputs, **how, block_size=tokens)
    query = torch.cat([inputs.query[:, :, :g], inputs.query[:, :, g + kept :]], dim=2)
    actual = lsg_attention(query, *inputs[1:], **how, block_size=8, backend=backend)
    assert actual.shape == query.shape and actual.isfinite().all()
    expected, sees_key = expected[:, :, g + kept :], sees_key[:, g + kept :]
    assert sees_key.any()
    assert _error_where_defined(actual[:, :, g:], expected, sees_key) <= TOLERANCE


@pytest.mark.parametrize(
    ("block_size", "sparse_block_size", "sparsity_factor"),
    [(12, 14, 2), (8, 10, 2), (16, 20, 2), (12, 8, 2), (8, 6, 2), (16, 12, 2), (4, 9, 1)],
)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sparsity_type", TYPES)
def test_windows_that_cut_a_chunk(
    sparsity_type: str,
    backend: str,
    block_size: int,
    sparse_block_size: int,
    sparsity_factor: int,
) -> None:
    """The order inside a chunk counts here, and norm's is by score."""
    sizes = {
        "block_size": block_size,
        "sparse_block_size": sparse_block_size,
        "sparsity_factor": sparsity_factor,
    }
    inputs = _inputs(2, HEADS, 117, HEAD_DIM)
    mask = torch.ones(2, 117, dtype=torch.bool)
    mask[0, [7, 8, 9, 40, 77, 78, 79, 80, 81, 100]] = False
    mask[1, 95:] = False
    arguments: dict[str, Any] = sizes | {
        "padding_mask": mask,
        "sparsity_type": sparsity_type,
        "lsh_projections": _projections(HEADS, HEAD_DIM, **sizes, pre_rounds=1),
    }
    expected, sees_key = oracle_attention(*inputs, **arguments)
    actual = lsg_attention(*inputs, **arguments, backend=backend)
    assert _error_where_defined(actual, expected, sees_key) <= TOLERANCE


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [12, TOKENS], ids=["short", "long"])
def test_first_token_masked_by_the_caller(tokens: int, backend: str, is_causal: bool) -> None:
    """Token 0 as the global token is a visible key on the long path all the same; short: masked."""
    inputs = _inputs(2, HEADS, tokens, HEAD_DIM)
    mask = torch.ones(2, tokens, dtype=torch.bool)
    mask[:, 0] = False
    mask[0, 9:] = False
    arguments = SETTINGS | {
        "padding_mask": mask,
        "num_global_tokens": 0,
        "first_token_global": True,
        "is_causal": is_causal,
    }
    expected, sees_key = oracle_attention(*inputs, **arguments)
    actual = lsg_attention(*inputs, **arguments, backend=backend)
    assert _error_where_defined(actual, expected, sees_key) <= TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sparsity_type", TYPES)
def test_first_token_is_no_sparse_token(sparsity_type: str, backend: str) -> None:
    """Factor 1, where all other tokens are: token 0 is listed in front and nowhere else."""
    inputs = _inputs(2, HEADS, TOKENS, HEAD_DIM)
    arguments = SETTINGS | {
        "padding_mask": _fixed_mask(),
        "num_global_tokens": 0,
        "first_token_global": True,
        "sparsity_factor": 1,
        "sparse_block_size": 16,
        "sparsity_type": sparsity_type,
    }
    expected = oracle_attention(*inputs, **arguments).output
    actual = lsg_attention(*inputs, **arguments, backend=backend)
    assert _error(actual, expected) <= TOLERANCE


def test_the_auto_backend_is_one_of_the_two() -> None:
    """The default computes the same."""
    inputs = _inputs(2, HEADS, TOKENS + 2, HEAD_DIM)
    arguments = SETTINGS | {"padding_mask": _fixed_mask()}
    expected = oracle_attention(*inputs, **arguments).output
    assert _error(lsg_attention(*inputs, **arguments), expected) <= TOLERANCE
    assert _error(lsg_attention(*inputs, **arguments, backend="auto"), expected) <= TOLERANCE


@pytest.mark.parametrize(
    "off",
    [
        {"sparse_block_size": 0},
        {"sparse_block_size": None},
        {"sparsity_factor": 0},
        {"sparsity_factor": None},
        {"sparsity_type": "none"},
        {"sparsity_type": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sparse_part_switched_off(off: dict[str, Any], backend: str) -> None:
    """All ways to say it leave the globals and the local window."""
    inputs = _inputs(2, HEADS, TOKENS + 2, HEAD_DIM)
    arguments = SETTINGS | {"padding_mask": _fixed_mask()}
    expected = oracle_attention(*inputs, **arguments | {"sparsity_type": "none"}).output
    actual = lsg_attention(*inputs, **arguments | off, backend=backend)
    assert _error(actual, expected) <= TOLERANCE
    # The sparse part does count here.
    with_sparse = lsg_attention(*inputs, **arguments, backend=backend)
    assert _error(with_sparse, expected) > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_ties_go_to_the_earlier_token(backend: str) -> None:
    """Keys of one length: the first half of every chunk is chosen, the latest of it first."""
    inputs = _inputs(2, HEADS, TOKENS + 2, HEAD_DIM)
    # Entries of +-1: the norms are equal to the last bit.
    inputs = inputs._replace(key=inputs.key.sign())
    arguments = SETTINGS | {"sparsity_type": "norm"}
    expected = oracle_attention(*inputs, **arguments).output
    actual = lsg_attention(*inputs, **arguments, backend=backend)
    assert _error(actual, expected) <= TOLERANCE


@pytest.mark.parametrize("sizes", [(8, 8, 2), (8, 10, 2)], ids=["whole chunks", "cut chunks"])
def test_norm_chooses_alike_in_single_and_double_precision(sizes: tuple[int, int, int]) -> None:
    """Single precision ranks by bits, double by sorting: the same ties, zeros and padding."""
    inputs = _inputs(2, HEADS, TOKENS + 2, HEAD_DIM)
    # small whole numbers: norms are often equal to the last bit, in either precision
    inputs = inputs._replace(key=inputs.key.round())
    inputs.key[:, :, 2 + 24 : 2 + 30] = 0
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[0, 37:] = mask[1, 11:15] = False
    block, sparse, factor = sizes
    arguments: dict[str, Any] = {
        "padding_mask": mask,
        "block_size": block,
        "sparse_block_size": sparse,
        "sparsity_factor": factor,
        "sparsity_type": "norm",
        "num_global_tokens": 2,
    }
    double = lsg_attention(*inputs, **arguments)
    single = lsg_attention(*(x.float() for x in inputs), **arguments)
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_prefers_a_visible_zero_key_to_padding(backend: str) -> None:
    """A visible key of norm 0 ranks above masked ones, which score 0 as well."""
    inputs = _inputs(1, HEADS, TOKENS + 2, HEAD_DIM)
    inputs.key[:, :, 2 + 32 :] = 0
    mask = torch.ones(1, TOKENS, dtype=torch.bool)
    mask[:, 32:36] = False  # the earlier half of the chunk [32, 40)
    arguments = SETTINGS | {"sparsity_type": "norm", "padding_mask": mask}
    expected = oracle_attention(*inputs, **arguments).output
    actual = lsg_attention(*inputs, **arguments, backend=backend)
    assert _error(actual, expected) <= TOLERANCE
    # It does matter to the block [16, 24), which has those keys in its right window.
    mask = mask.clone()
    mask[:, 32:40] = False
    without = oracle_attention(*inputs, **arguments | {"padding_mask": mask}).output
    assert _error(actual[:, :, 2 + 16 : 2 + 24], without[:, :, 2 + 16 : 2 + 24]) > 1e-3


# --- (b) padding ----------------------------------------------------------------------------------


# Content of the padding, and what rounding may do to the visible rows.
LARGE: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e30, TOLERANCE),
    torch.float32: (1e30, 1e-5),
    torch.bfloat16: (1e30, 2e-2),
    torch.float16: (1e3, 2e-3),
}


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("sparsity_type", "factor"), [*((kind, 2) for kind in TYPES), ("lsh", SETTINGS["block_size"])]
)
@pytest.mark.parametrize("dtype", LARGE, ids=str)
def test_padding_content_reaches_no_visible_row(
    dtype: torch.dtype,
    sparsity_type: str,
    factor: int,
    backend: str,
    is_causal: bool,
) -> None:
    """Any numbers in masked positions whose scores are finite: nothing changes."""
    g = SETTINGS["num_global_tokens"]
    inputs = _inputs(2, HEADS, TOKENS + g, HEAD_DIM, dtype=dtype)
    mask = _fixed_mask()
    arguments = SETTINGS | {
        "padding_mask": mask,
        "sparsity_factor": factor,
        "sparsity_type": sparsity_type,
        "is_causal": is_causal,
        "lsh_projections": _fixed_projections() if factor == 2 else None,
        "backend": backend,
    }
    is_padding = torch.cat([torch.zeros(2, g, dtype=torch.bool), ~mask], dim=1)
    is_compared = ~is_padding
    if is_causal:
        is_compared[:, :g] = False
    rows, positions = is_compared.nonzero(as_tuple=True)
    content, tolerance = LARGE[dtype]

    expected = lsg_attention(*inputs, **arguments)[rows, :, positions]
    for number in (content, -content):
        filled = (x.masked_fill(is_padding[:, None, :, None], number) for x in inputs)
        actual = lsg_attention(*filled, **arguments)[rows, :, positions]
        assert _error(actual, expected) <= tolerance


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sparsity_type", TYPES)
@pytest.mark.parametrize("tokens", [9, 16, 17, 37])
def test_right_padding_has_no_effect(
    sparsity_type: str, tokens: int, backend: str, is_causal: bool
) -> None:
    """Any amount of it, also where it turns a short input into a long one."""
    g = SETTINGS["num_global_tokens"]
    arguments = SETTINGS | {
        "sparsity_type": sparsity_type,
        "is_causal": is_causal,
        "lsh_projections": _fixed_projections(),
        "backend": backend,
    }
    longest = _inputs(1, HEADS, g + tokens + 40, HEAD_DIM)
    first = g if is_causal else 0
    expected = lsg_attention(*(x[:, :, : g + tokens] for x in longest), **arguments)
    for padding in (1, 7, 8, 40):
        mask = torch.zeros(1, tokens + padding, dtype=torch.bool)
        mask[:, :tokens] = True
        padded = (x[:, :, : g + tokens + padding] for x in longest)
        actual = lsg_attention(*padded, padding_mask=mask, **arguments)[:, :, : g + tokens]
        assert _error(actual[:, :, first:], expected[:, :, first:]) <= TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sparsity_type", TYPES)
def test_rows_of_a_batch_are_independent(sparsity_type: str, backend: str) -> None:
    """A row alone, in the batch, and in the reversed batch; lsh hashes every row alike."""
    inputs = _inputs(3, HEADS, TOKENS + 2, HEAD_DIM)
    mask = torch.cat([_fixed_mask(), torch.zeros(1, TOKENS, dtype=torch.bool)])
    arguments = SETTINGS | {"sparsity_type": sparsity_type, "backend": backend, "seed": 5}
    together = lsg_attention(*inputs, padding_mask=mask, **arguments)
    reverse = lsg_attention(*(x.flip(0) for x in inputs), padding_mask=mask.flip(0), **arguments)
    assert _error(reverse.flip(0), together) <= TOLERANCE
    for row in range(3):
        alone = slice(row, row + 1)
        output = lsg_attention(*(x[alone] for x in inputs), padding_mask=mask[alone], **arguments)
        assert _error(output, together[alone]) <= TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sparsity_type", TYPES)
def test_nothing_of_the_caller_is_written(sparsity_type: str, backend: str) -> None:
    """Inputs and mask are the same afterwards."""
    inputs = _inputs(2, HEADS, TOKENS, HEAD_DIM)
    mask, projections = _fixed_mask(), _fixed_projections()
    before = [x.clone() for x in (*inputs, mask, *projections)]
    arguments = SETTINGS | {"num_global_tokens": 0, "first_token_global": True}
    lsg_attention(
        *inputs,
        padding_mask=mask,
        **arguments,
        sparsity_type=sparsity_type,
        lsh_projections=projections,
        backend=backend,
    )
    for now, then in zip((*inputs, mask, *projections), before, strict=True):
        assert torch.equal(now, then)


# --- (c) lsh draws for itself ---------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_lsh_seed(backend: str) -> None:
    """The seed alone decides."""
    inputs = _inputs(2, HEADS, TOKENS + 2, HEAD_DIM)
    arguments = SETTINGS | {"sparsity_type": "lsh", "backend": backend}
    first = lsg_attention(*inputs, **arguments, seed=3)
    torch.manual_seed(99)
    assert torch.equal(lsg_attention(*inputs, **arguments, seed=3), first)
    others = [lsg_attention(*inputs, **arguments, seed=seed) for seed in range(4, 8)]
    assert max(_error(other, first) for other in others) > 1e-3


@pytest.mark.parametrize("seed", [None, 0, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lsh_leaves_the_global_generator_alone(backend: str, seed: int | None) -> None:
    """Neither advanced nor reseeded."""
    torch.manual_seed(17)
    before = torch.get_rng_state()
    inputs = _inputs(2, HEADS, TOKENS + 2, HEAD_DIM)
    lsg_attention(*inputs, **SETTINGS, sparsity_type="lsh", seed=seed, backend=backend)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sparsity_type", TYPES)
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_low_precision(
    dtype: torch.dtype, sparsity_type: str, backend: str, is_causal: bool
) -> None:
    """The result has the inputs' dtype and is near the exact one for the same inputs."""
    inputs = _inputs(2, HEADS, TOKENS + 2, HEAD_DIM, dtype=dtype)
    arguments = SETTINGS | {
        "padding_mask": _fixed_mask(),
        "sparsity_type": sparsity_type,
        "is_causal": is_causal,
        "lsh_projections": _fixed_projections(),
    }
    actual = lsg_attention(*inputs, **arguments, backend=backend)
    assert actual.dtype == dtype
    assert actual.isfinite().all()
    expected = oracle_attention(*(x.double() for x in inputs), **arguments).output
    # The choices of norm and lsh may differ where rounding makes two scores equal: most rows agree.
    errors = (actual.double() - expected)[:, :, 2:].abs().amax(dim=-1)
    assert float(errors.quantile(0.75)) < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW_PRECISION], ids=str)
def test_lsh_draws_in_every_dtype(dtype: torch.dtype, backend: str) -> None:
    """With its own projections, whatever the dtype; the seed means the same in all of them."""
    inputs = _inputs(2, HEADS, TOKENS + 2, HEAD_DIM, dtype=dtype)
    arguments = SETTINGS | {"sparsity_type": "lsh", "seed": 1, "backend": backend}
    actual = lsg_attention(*inputs, **arguments)
    assert actual.dtype == dtype
    assert actual.isfinite().all()
    exact = lsg_attention(*(x.double() for x in inputs), **arguments)
    errors = (actual.double() - exact).abs().amax(dim=-1)
    assert float(errors.quantile(0.75)) <= 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sparsity_type", TYPES)
def test_autocast(sparsity_type: str, backend: str) -> None:
    """Under autocast: no crash, near the float32 result, and a backward pass."""
    inputs = Inputs(
        *(x.requires_grad_() for x in _inputs(2, HEADS, TOKENS + 2, HEAD_DIM, dtype=torch.float32))
    )
    arguments = SETTINGS | {
        "padding_mask": _fixed_mask(),
        "sparsity_type": sparsity_type,
        "seed": 1,
        "backend": backend,
    }
    expected = lsg_attention(*inputs, **arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = lsg_attention(*inputs, **arguments)
    assert actual.isfinite().all()
    errors = (actual.float() - expected).detach().abs().amax(dim=-1)
    assert float(errors.quantile(0.75)) < 16 * torch.finfo(torch.bfloat16).eps
    for gradient in torch.autograd.grad(actual.float().square().sum(), inputs):
        assert gradient.isfinite().all()


# --- (d) gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sparsity_type", TYPES)
def test_gradcheck(sparsity_type: str, backend: str, is_causal: bool) -> None:
    """Derivatives of the long path; the choices of norm and lsh are constant nearby."""
    g, tokens, heads, head_dim = 1, 13, 2, 2
    inputs = _inputs(1, heads, g + tokens, head_dim)
    mask = torch.ones(1, tokens, dtype=torch.bool)
    mask[:, [5, 12]] = False
    projections = _projections(
        heads, head_dim, block_size=4, sparse_block_size=4, sparsity_factor=2, pre_rounds=1
    )

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = lsg_attention(
            query,
            key,
            value,
            mask,
            block_size=4,
            sparse_block_size=4,
            sparsity_factor=2,
            sparsity_type=sparsity_type,
            num_global_tokens=g,
            is_causal=is_causal,
            lsh_projections=projections,
            backend=backend,
        )
        return output[:, :, g:] if is_causal else output

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs])


# --- (e) rows of padding only ---------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [12, TOKENS], ids=["short", "long"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("g", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sparsity_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION], ids=str)
def test_all_padding_is_finite(
    dtype: torch.dtype, sparsity_type: str, backend: str, g: int, is_causal: bool, tokens: int
) -> None:
    """Forward and backward, with large inputs, with and without a global token to look at."""
    inputs = Inputs(
        *(
            (8 * x).to(dtype).requires_grad_()
            for x in _inputs(2, HEADS, tokens + g, HEAD_DIM, dtype=torch.float32)
        )
    )
    mask = torch.ones(2, tokens, dtype=torch.bool)
    mask[0] = False
    output = lsg_attention(
        *inputs,
        mask,
        **SETTINGS | {"num_global_tokens": g},
        sparsity_type=sparsity_type,
        is_causal=is_causal,
        seed=0,
        backend=backend,
    )
    assert output.isfinite().all()
    for gradient in torch.autograd.grad(output.float().square().mean(), inputs):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sparsity_type", TYPES)
def test_float16_has_room_for_sums_of_large_numbers(sparsity_type: str, backend: str) -> None:
    """256 numbers of about 600 are more than float16 holds; full attention never adds them up."""
    drawn = _inputs(1, 2, 1 + 1024, 16, dtype=torch.float32)
    key, value = (600 + 6 * x for x in drawn[1:])
    inputs = [x.to(torch.float16).requires_grad_() for x in (drawn.query, key, value)]
    exact = [x.detach().float().requires_grad_() for x in inputs]
    outputs = []
    for tensors in (inputs, exact):
        out = lsg_attention(
            *tensors,
            block_size=256,
            sparse_block_size=256,
            sparsity_factor=64,
            sparsity_type=sparsity_type,
            num_global_tokens=1,
            seed=0,
            backend=backend,
        )
        assert out.isfinite().all()
        outputs.append(out)
    torch.testing.assert_close(outputs[0].float(), outputs[1], rtol=2e-2, atol=0)
    for gradient in torch.autograd.grad(outputs[0].float().sum(), inputs):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [12, TOKENS], ids=["short", "long"])
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("sparsity_type", ["norm", "lsh", "bos_pooling"])
def test_autocast_is_that_of_full_attention(
    sparsity_type: str, backend: str, tokens: int, dtype: torch.dtype
) -> None:
    inputs = [x.requires_grad_() for x in _inputs(2, HEADS, tokens + 2, HEAD_DIM, dtype=dtype)]
    how: dict[str, Any] = SETTINGS | {"sparsity_type": sparsity_type, "backend": backend}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = lsg_attention(*inputs, **how)
        full = torch.nn.functional.scaled_dot_product_attention(*inputs)
        gradients = torch.autograd.grad(out.float().sum(), inputs)
    assert out.dtype == full.dtype == (dtype if dtype == torch.float64 else torch.bfloat16)
    assert all(x.dtype == dtype for x in gradients)
    torch.testing.assert_close(out, lsg_attention(*(x.to(out.dtype) for x in inputs), **how))


# --- (f) errors -----------------------------------------------------------------------------------

BLOCK_SIZE = r"(?<!sparse_)block_size"
ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "block_size not divisible": ({"block_size": 9, "sparse_block_size": 8}, BLOCK_SIZE),
    "sparse_block_size not divisible": ({"sparse_block_size": 7}, "sparse_block_size"),
    "factor above block_size": ({"sparsity_factor": 16, "sparse_block_size": 16}, BLOCK_SIZE),
    "block_size negative": ({"block_size": -8}, BLOCK_SIZE),
    "block_size zero": ({"block_size": 0}, BLOCK_SIZE),
    "sparse_block_size negative": ({"sparse_block_size": -8}, "sparse_block_size"),
    "sparsity_factor negative": ({"sparsity_factor": -2}, "sparsity_factor"),
    "num_global_tokens negative": ({"num_global_tokens": -1}, "num_global_tokens"),
    "num_global_tokens above length": ({"num_global_tokens": 99}, "num_global_tokens"),
    "lsh_num_pre_rounds negative": (
        {"lsh_num_pre_rounds": -1, "sparsity_type": "lsh"},
        "lsh_num_pre_rounds",
    ),
    "too few lsh_projections": (
        {"sparsity_type": "lsh", "lsh_projections": [torch.ones(HEADS, HEAD_DIM, 4)]},
        "lsh_projections",
    ),
    "lsh_projections of another size": (
        {
            "sparsity_type": "lsh",
            "lsh_projections": [
                torch.ones(HEADS, HEAD_DIM, 5),
                torch.ones(HEADS, HEAD_DIM, 2),
            ],
        },
        "lsh_projections",
    ),
    "unknown sparsity_type": ({"sparsity_type": "nrom"}, "sparsity_type"),
    "unknown backend": ({"backend": "flash"}, "backend"),
    "mask too short": ({"padding_mask": torch.ones(2, TOKENS - 1)}, "padding_mask"),
    "mask with globals": ({"padding_mask": torch.ones(2, TOKENS + 2)}, "padding_mask"),
    "mask of another batch": ({"padding_mask": torch.ones(3, TOKENS)}, "padding_mask"),
    "mask of four dimensions": ({"padding_mask": torch.ones(2, 1, 1, TOKENS)}, "padding_mask"),
    "more keys without is_causal": (
        {x: torch.ones(2, HEADS, TOKENS + 9, HEAD_DIM) for x in ("key", "value")},
        "key .*only with is_causal=True",
    ),
    "fewer keys": (
        {"key": torch.ones(2, HEADS, TOKENS, HEAD_DIM), "is_causal": True},
        "key must have the shape of query",
    ),
    "more keys than values": (
        {"key": torch.ones(2, HEADS, TOKENS + 9, HEAD_DIM), "is_causal": True},
        "value must have the shape of query",
    ),
    "mask without kept tokens": (
        {x: torch.ones(2, HEADS, TOKENS + 9, HEAD_DIM) for x in ("key", "value")}
        | {"is_causal": True, "padding_mask": torch.ones(2, TOKENS)},
        "padding_mask",
    ),
    "key of another length": ({"key": torch.ones(2, HEADS, TOKENS, HEAD_DIM)}, "key"),
    "key of another head size": ({"key": torch.ones(2, HEADS, TOKENS + 2, 3)}, "key"),
    "value of another batch": ({"value": torch.ones(1, HEADS, TOKENS + 2, HEAD_DIM)}, "value"),
    "value with fewer heads": ({"value": torch.ones(2, 1, TOKENS + 2, HEAD_DIM)}, "value"),
    "choose_by of another length": (
        {"choose_by": torch.ones(2, HEADS, TOKENS, HEAD_DIM)},
        "choose_by must have the shape of query",
    ),
    "query of three dimensions": ({"query": torch.ones(2, TOKENS + 2, HEAD_DIM)}, "query"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    """What cannot be defined is a ValueError that names the argument."""
    changes, match = ERRORS[name]
    inputs = _inputs(2, HEADS, TOKENS + 2, HEAD_DIM, dtype=torch.float32)
    valid = inputs._asdict() | SETTINGS
    lsg_attention(**valid)
    with pytest.raises(ValueError, match=match):
        lsg_attention(**valid | changes)


# --- (g) dropout ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [12, 21], ids=["short", "long"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sparsity_type", TYPES)
def test_dropout_is_right_on_average(sparsity_type: str, backend: str, tokens: int) -> None:
    """The mean over many draws is the result without dropout."""
    draws = 500
    inputs = _inputs(1, 1, tokens + 1, 2, dtype=torch.float32)
    repeated = [x.expand(draws, -1, -1, -1) for x in inputs]
    arguments: dict[str, Any] = {
        "block_size": 8,
        "sparse_block_size": 8,
        "sparsity_factor": 2,
        "sparsity_type": sparsity_type,
        "num_global_tokens": 1,
        "seed": 0,
        "backend": backend,
    }
    expected = lsg_attention(*inputs, **arguments)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = lsg_attention(*repeated, **arguments, dropout_p=0.3)
    deviation = output.std(dim=0)
    assert float(deviation.min()) > 0  # every row has lost something in some draw
    standard_error = deviation / draws**0.5
    assert float(((output.mean(dim=0) - expected[0]).abs() / standard_error).max()) < 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_dropout_is_deterministic(backend: str) -> None:
    """dropout_p 0 draws nothing."""
    inputs = _inputs(2, HEADS, TOKENS + 2, HEAD_DIM)
    before = torch.get_rng_state()
    first = lsg_attention(*inputs, **SETTINGS, dropout_p=0.0, backend=backend)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(lsg_attention(*inputs, **SETTINGS, backend=backend), first)


# --- (h) nothing to do ----------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [12, TOKENS], ids=["short", "long"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sparsity_type", TYPES)
def test_empty_batch(sparsity_type: str, backend: str, is_causal: bool, tokens: int) -> None:
    """No rows in, no rows out, with and without a mask; gradients exist."""
    inputs = [x.requires_grad_() for x in _inputs(0, HEADS, tokens + 2, HEAD_DIM)]
    for mask in (None, torch.ones(0, tokens, dtype=torch.bool)):
        output = lsg_attention(
            *inputs,
            mask,
            **SETTINGS,
            sparsity_type=sparsity_type,
            is_causal=is_causal,
            seed=0,
            backend=backend,
        )
        assert output.shape == (0, HEADS, tokens + 2, HEAD_DIM)
        for gradient in torch.autograd.grad(output.sum(), inputs):
            assert gradient.shape == inputs[0].shape


def test_lsh_of_one_bucket_is_bos_pooling_with_a_first_token_that_is_global() -> None:
    inputs = torch.randn(3, 2, 4, 75, 8, generator=torch.Generator().manual_seed(0))
    found = [
        lsg_attention(
            *inputs,
            block_size=8,
            sparse_block_size=4,
            sparsity_factor=4,
            sparsity_type=kind,
            first_token_global=True,
        )
        for kind in ("lsh", "bos_pooling")
    ]
    assert torch.equal(*found)
