"""Checkpoints as the reference would save them, of the golden models and of tiny ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import lsg_patch

# the reference's own defaults, of which a config need not say anything
DEFAULTS: dict[str, Any] = {
    "adaptive": True,
    "block_size": 128,
    "lsh_num_pre_rounds": 1,
    "mask_first_token": False,
    "num_global_tokens": 1,
    "pool_with_global": True,
    "sparse_block_size": 128,
    "sparsity_factor": 2,
    "sparsity_type": "norm",
    "pass_global_tokens_to_decoder": True,
}
ROWS = 512


def write(model: Any, folder: Path, kind: str = "model.safetensors", **changed: Any) -> Path:
    """Save a patched model as the reference would: 512 global rows, its keys, its class names.

    Settings that are the reference's defaults are left out. ``kind`` is the file of the weights;
    ``changed`` are keys of the config.
    """
    folder.mkdir(exist_ok=True)
    settings = lsg_patch.get_config(model)
    tensors: dict[str, Tensor] = {}
    once: dict[int, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        # what is tied is in such a file once, by the name that is no head's
        if id(value) not in once or "shared" in name or "embeddings" in name:
            once[id(value)] = name
    for name, value in model.state_dict(keep_vars=True).items():
        if once[id(value)] != name and kind.endswith(".safetensors"):
            continue
        rows = value.detach().clone()
        if name.endswith("global_embeddings.weight"):
            rows = torch.cat([rows, torch.full((ROWS - len(rows), rows.shape[1]), 9.0)])
        tensors[name] = rows
    name = type(model).__name__
    said = {
        "base_model_prefix": "lsg",
        "architectures": [f"LSG{name}"],
        # code that nobody may run
        "auto_map": {"AutoConfig": "code.LSGConfig", "AutoModel": f"code.LSG{name}"},
        "torch_dtype": "float32",
        "transformers_version": "4.36.2",
    }
    said.update(
        (key, getattr(settings, key))
        for key, default in DEFAULTS.items()
        if getattr(settings, key) != default
        and (model.config.is_encoder_decoder or not key.startswith("pass_"))
    )
    stated = json.loads(model.config.to_json_string(use_diff=False))
    for key in ("lsg_patch", "dtype", "_name_or_path"):
        stated.pop(key, None)
    (folder / "config.json").write_text(json.dumps({**stated, **said, **changed}))
    (folder / "code.py").write_text(f"open({str(folder / 'RAN')!r}, 'w')\n")
    if kind.endswith(".safetensors"):
        save_file(tensors, folder / kind, {"format": "pt"})
    else:
        torch.save(tensors, folder / kind)
    return folder
