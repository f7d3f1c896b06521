"""Tiny random encoder-decoders, and every head that transformers has for a family."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.models import CLS, MASK, POSITIONS, VOCABULARY, assert_same

__all__ = [
    "FAMILIES",
    "assert_same",
    "ids_like",
    "inputs_for",
    "model_classes",
    "run",
    "tiny_model",
]

# the prefix of its classes, and what a tiny config needs beyond the common settings
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("Bart", {}),
    "mbart": ("MBart", {"scale_embedding": True}),
    "pegasus": ("Pegasus", {"scale_embedding": True}),
}
PADDING, EOS = 1, 2


def tiny_config(family: str, **overrides: Any) -> Any:
    prefix, own = FAMILIES[family]
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": POSITIONS,
        # large weights: with the usual 0.02 attention is flat and a wrong one goes unseen
        "init_std": 0.3,
        "dropout": 0.0,
        "bos_token_id": CLS,
        "pad_token_id": PADDING,
        "eos_token_id": EOS,
        "decoder_start_token_id": EOS,
        "forced_eos_token_id": None,
        **own,
    }
    config = getattr(transformers, f"{prefix}Config")(**{**settings, **overrides})
    config.mask_token_id = MASK
    return config


def model_classes(family: str) -> list[type[Any]]:
    """The base model and all heads that have an encoder."""
    prefix = FAMILIES[family][0]
    module = inspect.getmodule(getattr(transformers, f"{prefix}Model"))
    return [
        cls
        for name, cls in sorted(vars(module).items())
        if inspect.isclass(cls)
        and issubclass(cls, transformers.PreTrainedModel)
        and name.startswith((f"{prefix}Model", f"{prefix}For"))
        and not name.endswith("CausalLM")
    ]


def tiny_model(family: str, head: str = "Model", seed: int = 0, **overrides: Any) -> Any:
    cls = getattr(transformers, FAMILIES[family][0] + head)
    torch.manual_seed(seed)
    model = cls(tiny_config(family, **overrides)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases and layer norms of fresh models are all alike
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def ids_like(mask: Tensor, seed: int = 1, begin_with_bos: bool = True) -> Tensor:
    """Random ids where ``mask`` is 1 and padding elsewhere, eos at each row's last token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, VOCABULARY, mask.shape, generator=generator)
    if begin_with_bos:
        ids = ids.scatter(1, mask.argmax(1, keepdim=True), CLS)
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1, keepdim=True)
    return ids.scatter(1, last, EOS).masked_fill(mask == 0, PADDING)


def inputs_for(model: Any, ids: Tensor, mask: Tensor | None) -> dict[str, Any]:
    """The arguments of a call; some heads make the decoder's input of the encoder's themselves."""
    given = {"input_ids": ids, "attention_mask": mask}
    if type(model).__name__.endswith(("Model", "ForConditionalGeneration")):
        given["decoder_input_ids"] = ids[:, :9].flip(1)
    return given


def run(model: Any, ids: Tensor, mask: Tensor | None, **kwargs: Any) -> dict[str, Tensor]:
    """The tensors that a model gives."""
    with torch.no_grad():
        output = model(**inputs_for(model, ids, mask), **kwargs)
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}
