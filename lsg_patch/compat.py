"""Every difference between versions of transformers, found by looking at what is there."""

from __future__ import annotations

import dis
import inspect
import sys
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


def forward_parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of a module's forward, in order, without ``self``.

    They were renamed and moved again and again (4.54, 4.56, 5.0, 5.4), so they are looked up.
    """
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


# a padding mask's name: most families; DistilBERT's stack, and its attention, before 5.0
MASK_NAMES = ("attention_mask", "attn_mask", "mask")


def passes_masks_of_four_dimensions(base: nn.Module) -> bool:
    """Whether a base model hands a (B, 1, 1, T) mask to its layers as it is.

    5.0 and later do (``create_bidirectional_mask``); given two dimensions they would expand them
    to (B, 1, T, T). Earlier versions take two dimensions and make (B, 1, 1, T) of them.
    """
    return _is_imported_beside(base, "create_bidirectional_mask")


def expands_masks_without_head_mask(base: nn.Module) -> bool:
    """Whether a base model expands the padding mask to (B, 1, T, T) unless it gets a head mask.

    4.41 to 4.57 do, for fused attention, in one family after the other. What says so is kept in
    three places (the model, a private attribute, the config, which models share); that there is
    a head mask is looked at in all of them.
    """
    return _is_imported_beside(base, "_prepare_4d_attention_mask_for_sdpa")


def _is_imported_beside(base: nn.Module, function: str) -> bool:
    """Whether the file that a model's forward stands in has this function."""
    for cls in type(base).__mro__:
        if "forward" in vars(cls):
            return hasattr(sys.modules[cls.__module__], function)
    return False


def stack_collects_hidden_states(stack: nn.Module) -> bool:
    """Whether the stack returns its hidden states (4.x), or hooks of the base model do (5.x)."""
    return "output_hidden_states" in forward_parameters(stack)


def attention_outputs(attention: nn.Module) -> int:
    """How many values a self-attention module must return: the states, the maps, perhaps a cache.

    Two are right everywhere but in BART's kind before 4.54, whose layers take three and no other
    number. Neither parameters nor annotations tell (they say three up to 5.3): the code does.
    """
    for cls in type(attention).__mro__:
        if "forward" in vars(cls):
            code = list(dis.get_instructions(inspect.unwrap(vars(cls)["forward"])))
            returned = [
                made.arg or 0
                for made, after in pairwise(code)
                if made.opname == "BUILD_TUPLE" and after.opname == "RETURN_VALUE"
            ]
            if returned:
                return max(2, *returned)
    return 2


@dataclass(frozen=True)
class MaskCarrier:
    """How a padding mask (B, T) comes through an encoder to its layers without growing.

    The encoder's own mask argument becomes (B, 1, T, T), unless it has four dimensions: then 5.0
    and later hand it on as it is. Before, ``head_mask`` is what every layer gets its part of.

    Attributes:
        argument: of the encoder.
        layer_argument: of its self-attention modules.
        layers: how many parts there must be; None: it is not cut into parts.
    """

    argument: str
    layer_argument: str
    layers: int | None

    @classmethod
    def of(cls, encoder: nn.Module, layers: int) -> MaskCarrier:
        if "head_mask" in forward_parameters(encoder):
            return cls("head_mask", "layer_head_mask", layers)
        return cls("attention_mask", "attention_mask", None)

    def pack(self, mask: Tensor) -> Tensor:
        """The encoder's argument that ``mask`` (B, T) travels as."""
        if self.layers is None:
            return mask[:, None, None, :]
        return mask.expand(self.layers, *mask.shape)

    def unpack(self, packed: Tensor) -> Tensor:
        """(B, T), of the encoder's argument."""
        return packed[:, 0, 0] if self.layers is None else packed[0]

    def unpack_in_layer(self, packed: Tensor) -> Tensor:
        """(B, T), of a self-attention module's argument."""
        return packed[:, 0, 0] if self.layers is None else packed


def word_scale(embeddings: Any, words: Any) -> float:
    """What words are multiplied with: where they are looked up (4.39 and later), or after that."""
    return float(getattr(words, "embed_scale", 1.0) * scale_of_looked_up_words(embeddings))


def scale_of_looked_up_words(embeddings: Any) -> float:
    """What the owner of the words multiplies with after looking them up."""
    return float(getattr(embeddings, "embed_scale", 1.0))


@dataclass(frozen=True)
class PositionInput:
    """What BART's kind of position table takes: the shape of ids, or (4.22) ids of that shape."""

    is_shape: bool

    @classmethod
    def of(cls, positions: nn.Module) -> PositionInput:
        return cls("input_ids_shape" in forward_parameters(positions))

    def like(self, ids: Tensor) -> Any:
        return ids.shape if self.is_shape else ids

    def one_token(self, given: Any) -> Any:
        """The argument for the first token alone."""
        return torch.Size((given[0], 1)) if self.is_shape else given[:, :1]


def is_left_behind(module: nn.Module, forward: Any) -> bool:
    """Whether an instance's own ``forward`` is only its class's, bound.

    5.0 and 5.1 leave such a one on every module whose outputs they recorded. It would hide the
    forward of another class; to take it away changes nothing.
    """
    return getattr(forward, "__func__", None) is type(module).forward


def has_relative_positions(config: Any) -> bool:
    """Whether the attention itself knows positions (4.x: relative_key, relative_key_query)."""
    # 4.54 and 4.55 have a property of this name where it has no effect, which warns when it is read
    return vars(config).get("position_embedding_type", "absolute") not in ("absolute", None)
