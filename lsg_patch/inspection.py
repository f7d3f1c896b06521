"""A checkpoint is looked at before anything is built from it, and after: what does not fit is named."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lsg_patch.families import family_of

# numbers of a config that make the sizes of weights, and how many of these there are
_SIZES = re.compile(r"(^|_)(size|dim|model|heads|num|embeddings|labels)$")
_COUNTS = re.compile(r"_(layers|groups)$")
_WIDTHS = ("hidden_size", "d_model", "dim")
# so many numbers, or layers, are made in any case
_HARMLESS, _FEW_LAYERS = 2**24, 100
# generation has a word for one of its choices
_ALSO_WORDS = ("early_stopping",)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# of weights whose numbers are no floating-point ones
_INDICES = re.compile(r"(^|\.|_)(ids|num_batches_tracked|index)$")
_MEND = "correct it, or save or fetch the checkpoint again"


def check_config(
    stated: Mapping[str, Any], defaults: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> None:
    """What ``config.json`` says is of the types that the ``defaults`` of its class have, and no size
    makes a weight larger than all the ``weights`` are.

    Raises:
        ValueError: it names the key, its value and the mend.
    """
    width = next((stated[name] for name in _WIDTHS if type(stated.get(name)) is int), 1)
    total = sum(weight.numel() for weight in weights.values())
    for name, value in stated.items():
        where = f"config.json has {name}={_short(value)}"
        kinds = _kinds(name, defaults.get(name))
        if kinds and value is not None and type(value) not in kinds:
            raise ValueError(f"{where}, which must be of type {kinds[0].__name__}: {_MEND}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where}, which must be finite: {_MEND}")
        if isinstance(value, dict) and "model_type" in value:
            check_config(value, {}, weights)
        size, count = _SIZES.search(name), _COUNTS.search(name)
        if not (size or count) or not isinstance(value, (int, float)) or value is True:
            continue
        if type(value) is float or value < 0:
            raise ValueError(f"{where}, which must be a whole number from 0 on: {_MEND}")
        most = max(total, _HARMLESS) // max(1, width) if size else max(len(weights), _FEW_LAYERS)
        if value > most:
            raise ValueError(f"{where}, more than the {total} numbers of its weights make: {_MEND}")
    for name in ("attn_implementation", "_attn_implementation"):
        if "/" in str(stated.get(name)):
            raise ValueError(f"config.json has {name}={stated[name]!r}, code of a hub: take it out")


def _kinds(name: str, default: Any) -> tuple[type, ...]:
    """What types a value may have by JSON, known from the default one; nothing: any."""
    if name.endswith("token_id") and default is not None:
        return int, list
    if name in _ALSO_WORDS or type(default) not in (bool, int, float, str, list, dict):
        return ()
    return (int, float) if type(default) in (int, float) else (type(default),)


def check_weights(path: str, weights: Mapping[str, Tensor], quantized: bool) -> None:
    """There are some, and all are floating-point numbers, if they are not ``quantized``.

    Raises:
        ValueError: there are none, or one is of another type.
    """
    if not weights:
        raise ValueError(f"{path!r} has no file of weights, or an empty one: {_MEND}")
    for name, weight in weights.items():
        if not quantized and weight.dtype not in _FLOATS and not _INDICES.search(name):
            raise ValueError(
                f"{path!r} has {name} as {weight.dtype}, weights are {', '.join(map(str, _FLOATS))}: "
                f"{_MEND}"
            )


def check_loaded(
    path: str,
    model: nn.Module,
    info: Mapping[str, Any],
    stored: Collection[str],
    whole: bool,
    resized: bool,
) -> None:
    """Every weight of ``model`` came from the checkpoint, and every one there has a place in it.

    Args:
        info: what ``from_pretrained`` says of the load; ``stored``: the names of the weights.
        whole: the class is the one that was saved; else a head may be new, or left out.
        resized: other shapes are what the caller asked for.

    Raises:
        ValueError: it names the weights.
    """
    family = family_of(getattr(model, "base_model", model))
    # 4.x says nothing of a table of words that only a head has, and makes a new one
    words = f"{family.embeddings}.{family.words}.weight" if family else ""
    if not any(name.endswith((words, "shared.weight")) for name in stored):
        raise ValueError(f"{path!r} lacks {words}: {_MEND}")
    missing = set(info["missing_keys"])
    state = model.state_dict(keep_vars=True) if missing else {}
    read = {id(weight) for name, weight in state.items() if name not in missing}
    missing -= {name for name, weight in state.items() if id(weight) in read}  # tied to one of them
    found: dict[str, Iterable[str]] = {
        "lacks": missing,
        "has no place in the model for": info["unexpected_keys"],
        "has of another shape": [] if resized else map(_named, info["mismatched_keys"]),
    }
    # without its head, the model's part that is patched alone
    parts = [
        f"{name}.{part}." if name else f"{part}."
        for name, module in model.named_modules()
        if (family := family_of(module)) is not None
        for part in (family.embeddings, family.stack, family.decoder)
        if part
    ]
    for what, named in found.items():
        wrong = sorted(
            name
            for name in named
            if not _INDICES.search(name)
            and not name.endswith("global_embeddings.weight")
            and (whole or any(f".{part}" in f".{name}" for part in parts))
        )
        if wrong:
            raise ValueError(
                f"{path!r} {what} {', '.join(wrong[:3])}{' ...' * (len(wrong) > 3)}: config.json and "
                f"weights of {type(model).__name__} do not fit; {_MEND}"
            )


def _named(item: Any) -> str:
    """Of a weight of another shape: its name, and the shapes where they are told."""
    if isinstance(item, str):
        return item
    name, *shapes = item
    told = [str(tuple(shape)) for shape in shapes if not isinstance(shape, str)]
    return f"{name} ({' for '.join(told)})" if told else str(name)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:50]}..."
