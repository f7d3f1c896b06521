"""Weights that are loaded into a patched model: trained global tokens are never left out silently."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class RequireGlobalTokens:
    """A hook before the base model loads a state dict: one without global tokens is refused.

    It is that of an unpatched model, perhaps of one that was made from a patched one's checkpoint
    and dropped them. PyTorch would find them missing only after everything else was loaded. With
    ``strict=False`` they may be missing, as everything may.

    Attributes:
        name: of the global tokens.
    """

    name: str

    def __call__(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *found: Any
    ) -> None:
        of_model = [key for key in state_dict if key.startswith(prefix)]
        if strict and of_model and not any(f".{self.name}." in f".{key}" for key in of_model):
            raise RuntimeError(
                f"nothing was loaded: the state dict has no {self.name}, so it is of a model that is not "
                "patched. If that was made from the checkpoint of a patched one, trained global tokens "
                "were dropped on the way: load the checkpoint's file itself (safetensors.torch.load_file), "
                "here or into the other model once it is patched. strict=False keeps the global tokens "
                "that this model has"
            )


def check_adapters(model: nn.Module, name: str) -> None:
    """Refuse adapters of PEFT that train the global tokens and were put on before there were any.

    Those of a saved adapter were dropped when it was loaded, and those that the patch makes would
    neither be trained nor saved.

    Raises:
        ValueError: there is one.
    """
    for module in model.modules():
        adapters = getattr(module, "peft_config", None)
        for adapter, config in adapters.items() if isinstance(adapters, dict) else ():
            if name in (getattr(config, "modules_to_save", None) or ()):
                raise ValueError(
                    f"the adapter {adapter!r} has modules_to_save={config.modules_to_save!r}, but was made "
                    "or loaded before the patch, and so without global tokens: patch the model first, then "
                    "get_peft_model or PeftModel.from_pretrained"
                )
