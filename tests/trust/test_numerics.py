"""Rounding: as small as that of full attention, in every precision, and finite wherever that is.

The sizes, selections and masks themselves are checked in float64 by ``tests/attention``.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import lsg_patch
from lsg_patch import lsg_attention
from lsg_patch.attention import SPARSITY_TYPES, draw_projections, make_geometry, projection_shapes
from tests.attention.test_flex import compiles
from tests.models import FAMILIES, ids_like, right_padded, run, stand_in, tiny_model
from tests.oracle import oracle_attention

HEADS, WIDTH, GLOBALS, TOKENS = 2, 16, 2, 77
SIZES: dict[str, Any] = {"block_size": 8, "sparse_block_size": 8, "sparsity_factor": 2}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TIMES = 2  # the rounding of full attention


def drawn(
    dtype: torch.dtype, tokens: int = TOKENS, batch: int = 2, scale: float = 1.0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(
        3, batch, HEADS, GLOBALS + tokens, WIDTH, generator=generator, dtype=torch.float64
    )
    return list((scale * x).to(dtype))


def with_gradients(function: Any, inputs: list[Tensor], weights: Tensor) -> list[Tensor]:
    """The output where ``weights`` (B, H, N, D) are not 0, and the gradients of what they make of it."""
    inputs = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = function(*inputs)
    gradients = torch.autograd.grad((out * weights.to(out.dtype)).sum(), inputs)
    return [out.detach() * (weights != 0), *gradients]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


def settings_of(sparsity_type: str) -> dict[str, Any]:
    how = {**SIZES, "sparsity_type": sparsity_type, "num_global_tokens": GLOBALS}
    if sparsity_type == "lsh":
        shapes = projection_shapes(make_geometry(*SIZES.values(), sparsity_type), HEADS, WIDTH, 1)
        how["lsh_projections"] = draw_projections(shapes, 0)
    return how


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_rounding_is_at_most_twice_that_of_full_attention(
    sparsity_type: str, dtype: torch.dtype, is_causal: bool
) -> None:
    """Outputs and gradients of the same rounded inputs, against the oracle in float64."""
    inputs = drawn(dtype)
    mask = right_padded(TOKENS, TOKENS - 20).bool()
    exact_inputs = [x.double() for x in inputs]
    weights = drawn(torch.float64, batch=2)[0].to(dtype).double()
    if is_causal:
        weights[:, :, :GLOBALS] = 0  # not defined there

    def oracle(*x: Tensor, **how: Any) -> Tensor:
        return oracle_attention(*x, **how, padding_mask=mask, is_causal=is_causal).output

    seen = F.pad(mask, (GLOBALS, 0), value=True)[:, None, None, :]
    if is_causal:
        seen = seen & torch.ones(GLOBALS + TOKENS, GLOBALS + TOKENS, dtype=torch.bool).tril()
    all_in_one = {"block_size": TOKENS, "num_global_tokens": GLOBALS}
    allowed = errors(
        with_gradients(lambda *x: F.scaled_dot_product_attention(*x, seen), inputs, weights),
        with_gradients(lambda *x: oracle(*x, **all_in_one), exact_inputs, weights),
    )
    how = settings_of(sparsity_type)
    exact = with_gradients(lambda *x: oracle(*x, **how), exact_inputs, weights)
    how |= {"padding_mask": mask, "is_causal": is_causal}
    for backend in ("dense", "sdpa"):
        of_backend = partial(lsg_attention, **how, backend=backend)
        found = with_gradients(of_backend, inputs, weights)
        for name, error, of_full in zip(
            ("output", "query", "key", "value"), errors(found, exact), allowed, strict=True
        ):
            assert error <= TIMES * of_full, (backend, name, error / of_full)


@compiles
@pytest.mark.skipif(
    "LSG_LONG_TESTS" not in os.environ, reason="compiles for a minute each; LSG_LONG_TESTS=1"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_of_flex(dtype: torch.dtype) -> None:
    """Forward alone, as on any CPU."""
    inputs, exact = drawn(dtype), [x.double() for x in drawn(dtype)]
    full = F.scaled_dot_product_attention(*inputs)
    [allowed] = errors([full], [F.scaled_dot_product_attention(*exact)])
    how = settings_of("pooling")
    with torch.no_grad():
        found = lsg_attention(*inputs, **how, backend="flex")
    [error] = errors([found], [oracle_attention(*exact, **how).output])
    assert error <= TIMES * allowed


MASKS = {"all": slice(0, None), "one": slice(3, 4), "none": slice(0, 0), "right": slice(0, 40)}


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [*((dtype, 1.0) for dtype in DTYPES), *((dtype, 1e4) for dtype in DTYPES[1:])],
)
@pytest.mark.parametrize("backend", ["dense", "sdpa"])
def test_nothing_is_infinite(backend: str, dtype: torch.dtype, scale: float) -> None:
    """Around 1 to 10 blocks, with a row of padding alone and one of a single token, and no rows."""
    lengths = [8 * blocks + more for blocks in range(1, 11) for more in (-1, 0, 1)]
    for i, tokens in enumerate(lengths):
        inputs = [x.clamp(-2 * scale, 2 * scale) for x in drawn(dtype, tokens, len(MASKS), scale)]
        mask = torch.zeros(len(MASKS), tokens)
        for row, seen in zip(mask, MASKS.values(), strict=True):
            row[seen] = 1
        full = [x.requires_grad_() for x in inputs]
        shown = F.pad(mask, (GLOBALS, 0), value=1).bool()[:, None, None]
        of_full = F.scaled_dot_product_attention(*full, shown)
        gradients = torch.autograd.grad(of_full.float().mean(), full)
        assert all(x.isfinite().all() for x in (of_full, *gradients))  # else nothing is asked
        for sparsity_type in SPARSITY_TYPES[(i + i // 3) % 4 :: 4]:
            of_type = partial(lsg_attention, **settings_of(sparsity_type), backend=backend)
            out = of_type(*full, mask)
            gradients = torch.autograd.grad(out.float().mean(), full)
            for x in (out, *gradients):
                assert x.isfinite().all(), (tokens, sparsity_type)
            assert of_type(*(x[:0] for x in full), mask[:0]).shape[0] == 0


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["dense", "sdpa"])
def test_hidden_keys_are_hidden_whatever_their_scores(
    backend: str, dtype: torch.dtype, is_causal: bool
) -> None:
    """In float16 a score may be far above all that could be taken off it."""
    query, key, value = drawn(dtype, scale=100.0)
    mask = right_padded(TOKENS, TOKENS - 30)
    how = {**settings_of("stride"), "is_causal": is_causal, "backend": backend}
    for tokens in (TOKENS, 15):
        end = GLOBALS + tokens
        others = [x[:, :, :end].clone() for x in (query, key, value)]
        short = mask[:, :tokens] if tokens == TOKENS else right_padded(tokens, tokens - 9)
        expected = lsg_attention(*others, short, **how)
        others[1][:, :, GLOBALS:][~short.bool()[:, None].expand(-1, HEADS, -1)] *= 100
        others[2][:, :, GLOBALS:][~short.bool()[:, None].expand(-1, HEADS, -1)] = 9.0
        if is_causal:  # what stands after the first half as well
            others[1][:, :, end - 9 :] *= -1
        found = lsg_attention(*others, short, **how)
        seen = end - 9 if is_causal else end
        rows = F.pad(short, (GLOBALS, 0), value=1).bool()[:, :seen]
        assert torch.equal(
            found[:, :, :seen].transpose(1, 2)[rows], expected[:, :, :seen].transpose(1, 2)[rows]
        )


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.long, *DTYPES], ids=str)
def test_masks_of_every_type_are_one(kind: torch.dtype) -> None:
    inputs, mask = drawn(torch.float32), right_padded(TOKENS, 33)
    expected = lsg_attention(*inputs, mask, **settings_of("norm"))
    assert torch.equal(lsg_attention(*inputs, mask.to(kind), **settings_of("norm")), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_models_round_as_they_do_unpatched(family: str, dtype: torch.dtype) -> None:
    """Where a patch changes nothing, what half precision does is of one size; long inputs are finite."""
    mask = right_padded(15, 9)
    ids = ids_like(mask, family)
    exact = run(tiny_model(family), ids, mask)["last_hidden_state"]
    model = tiny_model(family).to(dtype)
    unpatched = run(model, ids, mask)["last_hidden_state"]
    lsg_patch.patch_model(model, **SIZES, max_position_embeddings=99, **stand_in(family))
    found = run(model, ids, mask)["last_hidden_state"]
    seen = mask.bool()
    allowed, error = ((x.float() - exact)[seen].norm() for x in (unpatched, found))
    assert error <= TIMES * allowed
    long = right_padded(90, 1)
    out = run(model, ids_like(long, family), long)["last_hidden_state"]
    assert out.isfinite().all()
