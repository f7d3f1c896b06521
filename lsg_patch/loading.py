"""Weights that are loaded into a patched model: trained global tokens are never left out silently."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class CheckStateDict:
    """A hook before a patched base model loads a state dict, which refuses one of an unpatched model.

    That is one that has everything but the global tokens; a part of a state dict may lack them.
    PyTorch finds out what does not fit when it has loaded the rest, and does not tell hooks whether
    it is strict.

    Attributes:
        name: of the global tokens.
        tables: the names of the weights whose lengths a patch changed.
    """

    name: str
    tables: tuple[str, ...]

    def __call__(
        self, base: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any
    ) -> None:
        own = {
            prefix + name: parameter
            for name, parameter in base.named_parameters()
            if not name.endswith(".new_rows")  # state dicts have them in their tables
        }
        missing = own.keys() - state_dict.keys()
        if missing and all(f".{self.name}." in f".{name}" for name in missing):
            raise RuntimeError(
                f"nothing was loaded: the state dict has no {min(missing)}, so it is of a model that is "
                "not patched. If that was made from the checkpoint of a patched one, trained global tokens "
                "were dropped on the way: load that again under lsg_patch.auto_patching(), or load the "
                "checkpoint's file itself (safetensors.torch.load_file). To keep the global tokens that "
                "this model has, load {**model.state_dict(), **state_dict}"
            )
        for name in {prefix + table for table in self.tables} & own.keys() - missing:
            rows, loaded = len(own[name]), len(state_dict[name])
            if rows != loaded:
                raise RuntimeError(
                    f"nothing was loaded: {name} has {loaded} rows in the state dict and {rows} in the "
                    "model: patch the model with the max_position_embeddings that the state dict's had"
                )


def check_adapters(model: nn.Module, name: str) -> None:
    """Refuse adapters of PEFT that train the global tokens and were put on before there were any.

    Those of a saved adapter were dropped when it was loaded, and those that the patch makes would
    neither be trained nor saved.

    Raises:
        ValueError: there is one.
    """
    for module in model.modules():
        held = vars(module)
        adapters = held.get("peft_config", held.get("_peft_config"))
        for adapter, config in adapters.items() if isinstance(adapters, dict) else ():
            if name in (getattr(config, "modules_to_save", None) or ()):
                raise ValueError(
                    f"the adapter {adapter!r} has modules_to_save={config.modules_to_save!r}, but was made "
                    "or loaded before the patch, and so without global tokens: patch the model first, then "
                    "get_peft_model or PeftModel.from_pretrained; under auto_patching load it by "
                    "AutoPeftModel..., and give that to a pipeline"
                )
