"""What a swapped self-attention module has besides its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lsg_patch
from tests.models import attentions, ids_like, right_padded, run, tiny_model


class Packed(nn.Linear):
    """Weights stored as whole numbers, as bitsandbytes has them."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(linear.in_features, linear.out_features)
        scale = linear.weight.detach().abs().max() / 127
        stored = (linear.weight.detach() / scale).round() + (128 if dtype == torch.uint8 else 0)
        self.zero = 128 if dtype == torch.uint8 else 0
        self.scale = float(scale)
        self.weight = nn.Parameter(stored.to(dtype), requires_grad=False)
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return x @ ((self.weight.to(x.dtype) - self.zero) * self.scale).T


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_projections_of_lsh_are_of_a_floating_dtype(dtype: torch.dtype) -> None:
    model: Any = tiny_model("bert")
    for attention in attentions(model, "bert"):
        for name in ("query", "key", "value"):
            setattr(attention, name, Packed(getattr(attention, name), dtype))
    settings: dict[str, Any] = {"block_size": 16, "sparse_block_size": 16, "sparsity_type": "lsh"}
    lsg_patch.patch_model(model, max_position_embeddings=256, **settings)
    for attention in attentions(model, "bert"):
        projection = attention.lsh_projection_0
        assert projection.dtype == torch.float32
        assert float(projection.std()) == pytest.approx(1.0, abs=0.2) and projection.all()
    ids = ids_like(right_padded(90), "bert")
    assert run(model, ids, None)["last_hidden_state"].isfinite().all()
