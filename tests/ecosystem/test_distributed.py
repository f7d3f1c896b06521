"""FSDP and DDP with two processes: a patched model's outputs and gradients are those of one process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

import lsg_patch
from tests.models import ids_like, right_padded, tiny_model

SETTINGS: dict[str, Any] = {"block_size": 8, "sparse_block_size": 8, "max_position_embeddings": 100}


def wrapped(model: Any, way: str) -> Any:
    """``model`` as it is wrapped in each way; the embeddings alone too, as transformers proposes it."""
    parts = [*model.encoder.layer, model.embeddings]
    if way == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True)
    if way == "fsdp":
        policy = ModuleWrapPolicy({type(part) for part in parts})
        cpu = torch.device("cpu")
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, device_id=cpu, use_orig_params=True
        )
    for part in parts:
        fully_shard(part)
    return fully_shard(model)


def step(model: Any, family: str) -> torch.Tensor:
    output: torch.Tensor = model(ids_like(right_padded(60, 41), family)).last_hidden_state
    output.square().mean().backward()
    return output.detach()


def work(rank: int, way: str, family: str, folder: str) -> None:
    # one lasts as long as the other: who leaves first takes the connection along
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    torch.set_num_threads(1)
    alone = lsg_patch.patch_model(tiny_model(family), **SETTINGS)
    expected = step(alone, family)
    wanted = {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}
    model = wrapped(lsg_patch.patch_model(tiny_model(family), **SETTINGS), way)
    for _ in range(2):  # a second pass meets what the first one has left
        model.zero_grad()
        assert torch.allclose(step(model, family), expected, atol=1e-6)
    if way == "fsdp2":
        found = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == wanted.keys() and "embeddings.global_embeddings.weight" in found
        for name, grad in found.items():
            assert torch.allclose(grad, wanted[name], atol=1e-5), name
    elif way == "ddp":
        for name, parameter in model.module.named_parameters():
            if name in wanted:
                assert torch.allclose(parameter.grad, wanted[name], atol=1e-5), name
    distributed.barrier()
    Path(folder, f"done-{rank}").touch()
    os._exit(0)


@pytest.mark.parametrize("family", ["bert", "electra"])
@pytest.mark.parametrize("way", ["ddp", "fsdp", "fsdp2"])
def test_two_processes_are_as_one(way: str, family: str, tmp_path: Path) -> None:
    multiprocessing.spawn(work, args=(way, family, str(tmp_path)), nprocs=2)
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}
