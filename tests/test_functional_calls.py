"""Transforms of torch.func over patched models, and runs without values, at every length."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, stack_module_state, vmap

import lsg_patch
from tests.models import ids_like, right_padded, tiny_model

SETTINGS: dict[str, Any] = {
    "block_size": 16,
    "sparse_block_size": 16,
    "max_position_embeddings": 256,
    "num_global_tokens": 2,
}
LENGTHS = pytest.mark.parametrize("length", [20, 90], ids=["short", "long"])
MASKED = pytest.mark.parametrize("masked", [False, True])


def tokens(length: int, masked: bool) -> tuple[Tensor, Tensor | None]:
    mask = right_padded(length, length - 7, length)
    return ids_like(mask, "bert"), mask if masked else None


def loss(model: nn.Module, state: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    output: Tensor = functional_call(model, state, (ids, mask)).last_hidden_state
    return output.square().mean()


@LENGTHS
@MASKED
@pytest.mark.parametrize("sparsity_type", ["norm", "lsh", "bos_pooling"])
def test_gradients_of_each_sample(length: int, masked: bool, sparsity_type: str) -> None:
    model = tiny_model("bert")
    # 4.x looks for padding where there is no mask, which no model can under vmap
    model.config.pad_token_id = None
    lsg_patch.patch_model(model, sparsity_type=sparsity_type, **SETTINGS)
    state = {name: x.detach() for name, x in model.named_parameters()}
    ids, mask = tokens(length, masked)

    def of_sample(state: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
        return loss(model, state, ids[None], None if mask is None else mask[None])

    in_dims = (None, 0, 0 if masked else None)
    found = vmap(grad(of_sample), in_dims=in_dims)(state, ids, mask)
    for i in range(len(ids)):
        model.zero_grad()
        loss(model, {}, ids[i : i + 1], None if mask is None else mask[i : i + 1]).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(found[name][i], parameter.grad, rtol=1e-3, atol=1e-4)


@LENGTHS
@MASKED
def test_ensembles_over_stacked_parameters(length: int, masked: bool) -> None:
    models = [tiny_model("bert", seed=seed) for seed in range(3)]
    for model in models:
        lsg_patch.patch_model(model, **SETTINGS)
    parameters, buffers = stack_module_state(models)  # type: ignore[arg-type]
    ids, mask = tokens(length, masked)
    frame = copy.deepcopy(models[0])

    def call(parameters: Any, buffers: Any) -> Tensor:
        output: Tensor = functional_call(
            frame, (parameters, buffers), (ids, mask)
        ).last_hidden_state
        return output

    with torch.no_grad():
        expected = torch.stack([model(ids, mask).last_hidden_state for model in models])
        found = vmap(call)(parameters, buffers)
    seen = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(found[:, seen], expected[:, seen], rtol=0, atol=1e-4)


KNOWS = hasattr(torch._C, "_TorchDispatchModeKey")


@pytest.mark.skipif(not KNOWS, reason="torch below 2.2 does not tell that a value is not there")
@LENGTHS
@MASKED
@pytest.mark.parametrize("training", [False, True])
def test_shapes_are_known_without_values(length: int, masked: bool, training: bool) -> None:
    """As those who plan memory run a model: nothing of a tensor can be looked at."""
    model = lsg_patch.patch_model(tiny_model("bert"), **SETTINGS).train(training)
    model.config.pad_token_id = None  # as above
    ids, mask = tokens(length, masked)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.set_grad_enabled(training):
        output = model(ids, mask).last_hidden_state
        if training:
            output.sum().backward()
    assert type(output).__name__ == "FakeTensor"
    assert output.shape == (*ids.shape, model.config.hidden_size)
    grads = [parameter.grad for parameter in model.parameters()]
    assert any(x is not None for x in grads) == training
