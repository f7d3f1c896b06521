"""Tensors are made where the input is, whatever device others are made on by default.

That one is ``meta`` here, which no result could come from: so it is seen without a GPU.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import lsg_patch
from lsg_patch.attention import SPARSITY_TYPES, RelativeBias, lsg_attention
from tests import seq2seq
from tests.models import FAMILIES, ids_like, right_padded, tiny_model
from tests.tokenizers import tokenizer_like

TOKENS, HEADS = 43, 4
USES: dict[str, dict[str, Any]] = {
    "plain": {},
    "globals": {"num_global_tokens": 2},
    "first token": {"first_token_global": True},
    "causal": {"is_causal": True},
    "bias": {"bias": True},
    "bias and globals": {"bias": True, "num_global_tokens": 2},
    "bias and first token": {"bias": True, "first_token_global": True},
    "dropout": {"dropout_p": 0.3},
}


def attend(use: str, default: str, **settings: Any) -> list[Tensor]:
    """The output and the gradients."""
    how = {**USES[use], **settings}
    generator, rows = torch.Generator().manual_seed(0), TOKENS + how.get("num_global_tokens", 0)
    inputs = [torch.randn(2, HEADS, rows, 8, generator=generator) for _ in range(3)]
    mask = torch.rand(2, TOKENS, generator=generator) > 0.2
    if how.pop("bias", False):
        positions = None if rows == TOKENS else torch.arange(rows)[None]
        table = torch.randn(HEADS, 25, generator=generator)
        how["relative_bias"] = RelativeBias(table, positions)
    for x in inputs:
        x.requires_grad_()
    torch.manual_seed(0)
    with torch.device(default):
        out = lsg_attention(*inputs, mask, block_size=8, sparse_block_size=8, **how)
        out.square().sum().backward()
    return [out.detach(), *(x.grad for x in inputs if x.grad is not None)]


@pytest.mark.parametrize("backend", ["auto", "sdpa", "dense"])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_attention(sparsity_type: str, use: str, backend: str) -> None:
    settings = {"sparsity_type": sparsity_type, "backend": backend}
    expected, found = (attend(use, default, **settings) for default in ("cpu", "meta"))
    assert len(found) == 4
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0)


@pytest.mark.parametrize("family", [*FAMILIES, *seq2seq.FAMILIES])
def test_models(family: str) -> None:
    """Patched, and run, on a CPU while tensors are made elsewhere; transformers itself makes some."""
    mask = right_padded(60, 41, 7)
    if family in seq2seq.FAMILIES:
        model, ids = seq2seq.tiny_model(family), seq2seq.ids_like(mask)
    else:
        model, ids = tiny_model(family), ids_like(mask, family)
    for sparsity_type in ("norm", "lsh", "bos_pooling"):
        how: dict[str, Any] = {
            "block_size": 8,
            "sparse_block_size": 8,
            "max_position_embeddings": 150,
            "sparsity_type": sparsity_type,
            "num_global_tokens": 3,
            "random_global_init": sparsity_type == "lsh",
            "tokenizer": tokenizer_like(),
        }
        expected = lsg_patch.patch_model(copy.deepcopy(model), **how)
        with torch.device("meta"):
            found = lsg_patch.patch_model(copy.deepcopy(model), **how)
        assert not any(x.is_meta for x in (*found.parameters(), *found.buffers()))
        if family in seq2seq.FAMILIES:
            expected, found = expected.encoder, found.encoder
        with torch.no_grad():
            outputs = [x(input_ids=ids, attention_mask=mask)[0] for x in (expected, found)]
        assert torch.equal(*outputs)
