"""Loads the golden data in `tests/golden/`: outputs of the reference implementation on tiny models.

`index.json` lists the cases. A case of kind "model" names the vanilla model that it was made from;
kinds "attention_inner", "attention_layer" and "conversion" stand alone.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROOT = Path(__file__).parent / "golden"
KINDS = ("model", "attention_inner", "attention_layer", "conversion")
SEQ2SEQ = ("bart", "mbart", "pegasus")

Entry = dict[str, Any]


class VanillaModel(NamedTuple):
    """An unpatched model in eval mode with the golden weights."""

    model: PreTrainedModel
    meta: dict[str, Any]  # the model's .json
    extra: dict[str, Tensor]  # `vanilla_check.*` and `expected.*`


@cache
def _index() -> tuple[Entry, ...]:
    return tuple(json.loads((ROOT / "index.json").read_text(encoding="utf-8")))


def entries(kind: str) -> list[Entry]:
    """All cases of one kind, in the order of the index."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    return [entry for entry in _index() if entry["kind"] == kind]


def tensors(entry: Entry) -> dict[str, Tensor]:
    """The tensors of one case."""
    return load_file(ROOT / entry["file"])


def model_names() -> list[str]:
    """The vanilla models, as the `model` key of the entries names them."""
    return sorted({entry["model"] for entry in entries("model")})


def vanilla_model(
    name: str,
    task: str | None = None,
    dtype: torch.dtype = torch.float32,
    **config_overrides: Any,
) -> VanillaModel:
    """The vanilla model `name`, or the model with the head of `task`.

    The weights are stored in float16 without loss, so any wider `dtype` has them exactly.
    """
    import transformers

    meta = json.loads((ROOT / f"{name}.json").read_text(encoding="utf-8"))
    stored = load_file(ROOT / f"{name}.safetensors")

    settings = {k: v for k, v in meta["config"].items() if k not in ("model_type", "architectures")}
    class_name = meta["base_class"]
    if task is not None:
        class_name = meta["head_classes"][task]
        # `num_labels` decides; stored label names would contradict it.
        settings.pop("id2label", None)
        settings.pop("label2id", None)
        settings.update(meta["head_config_overrides"][task])
    settings.update(config_overrides)
    config = getattr(transformers, meta["config_class"])(**settings)
    model = getattr(transformers, class_name)(config).eval()

    result = model.base_model.load_state_dict(_with_prefix(stored, "base."), strict=False)
    # Some models with a head are built without the pooler that the base model has.
    unused = [k for k in result.unexpected_keys if task is None or "pooler" not in k]
    if unused:
        raise ValueError(f"{name}: {class_name} has no place for {unused}")
    if task is not None:
        result = model.load_state_dict(_with_prefix(stored, f"head.{task}."), strict=False)
        if result.unexpected_keys:
            raise ValueError(f"{name}: {class_name} has no place for {result.unexpected_keys}")
    model.tie_weights()

    extra = {k: v for k, v in stored.items() if k.startswith(("vanilla_check.", "expected."))}
    return VanillaModel(model.to(dtype), meta, extra)


def _with_prefix(stored: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
