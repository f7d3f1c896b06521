"""A training script as people write it for accelerate, which `accelerate launch` starts in test_launch.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import lsg_patch
from tests.models import ids_like, right_padded, tiny_model

SETTINGS: dict[str, Any] = {"block_size": 8, "sparse_block_size": 8, "max_position_embeddings": 100}
MASK = right_padded(*range(60, 76))
ROWS = [
    {"input_ids": ids, "attention_mask": mask, "labels": label}
    for ids, mask, label in zip(ids_like(MASK, "bert"), MASK, MASK[:, 70], strict=True)
]


def accelerator_for(way: str) -> Accelerator:
    AcceleratorState._reset_state()
    made = Accelerator(cpu=True, gradient_accumulation_steps=2)
    if way == "fsdp2":
        # accelerate asks for a GPU before it shards; nothing else of its way needs one
        made.state.distributed_type = DistributedType.FSDP
        made.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["BertLayer"],
            cpu_ram_efficient_loading=False,
        )
    return made


def train(way: str) -> dict[str, Any]:
    """Two steps of eight texts, whatever the number of processes: the losses, and the weights after it."""
    accelerator = accelerator_for(way)
    model = tiny_model("bert", transformers.BertForSequenceClassification).train()
    lsg_patch.patch_model(model, **SETTINGS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader = DataLoader(ROWS, batch_size=4 // accelerator.num_processes)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses: list[float] = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
            optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach().reshape(1)).mean().item())
        # DDP says it too: with its defaults it goes on only if every parameter took part
        assert not unused, unused
    weights = {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in accelerator.get_state_dict(model).items()
    }
    return {"losses": losses, "weights": weights, "type": type(model).__name__}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for kind in sys.argv[2:]:
        found = train(kind)
        if torch.distributed.get_rank() == 0:
            torch.save(found, Path(sys.argv[1], kind))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # torch 2.13 may abort where it ends its threads after that
