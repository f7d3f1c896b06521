"""Weights that accelerate keeps away from their modules, on a CPU or on disk, until these run.

Such a module has a hook of accelerate's (``_hf_hook``), parameters on the device ``meta``, and their
values in a mapping of the hook's, by their names.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


def keeper_of(module: nn.Module) -> Any:
    """The hook that has the values of ``module``'s tensors, or None."""
    hooks = [vars(module).get("_hf_hook")]
    for hook in hooks:
        hooks.extend(getattr(hook, "hooks", ()))  # several in one
        if getattr(hook, "offload", False) and getattr(hook, "weights_map", None) is not None:
            return hook
    return None


def value_of(module: nn.Module, name: str = "weight") -> Tensor:
    """The values of a parameter or a buffer of ``module``, wherever they are."""
    tensor: Tensor = getattr(module, name)
    keeper = keeper_of(module) if tensor.is_meta else None
    return tensor if keeper is None else keeper.weights_map[name].to(tensor.dtype)


def device_of(module: nn.Module) -> torch.device:
    """Where an input of ``module`` may be, and what is made for it."""
    tensor = next(chain(module.parameters(), module.buffers()), None)
    if tensor is None or (tensor.is_meta and any(map(keeper_of, module.modules()))):
        return torch.device("cpu")
    return tensor.device


def keep(module: nn.Module, name: str, values: Tensor) -> Tensor:
    """Leave ``values`` to the hook of ``module``; gives what the module itself has meanwhile."""
    keeper = keeper_of(module)
    below = keeper.weights_map
    below = below.maps[1] if isinstance(below, ChainMap) else below
    keeper.weights_map = ChainMap({name: values}, below)
    return values.to("meta")


def forget(module: nn.Module, name: str) -> None:
    """Let the hook of ``module`` not look for a tensor that is there no more, when it is removed."""
    getattr(keeper_of(module), "original_devices", {}).pop(name, None)


def kept_as_a_whole(model: nn.Module) -> Iterator[nn.Module]:
    """The modules whose hooks also keep what is below them."""
    for module in model.modules():
        keeper = keeper_of(module)
        if keeper is not None and keeper.place_submodules and any(True for _ in module.children()):
            yield module
