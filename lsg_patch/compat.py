"""Every difference between versions of transformers, found by looking at what is there."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import nn


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


def is_left_behind(module: nn.Module, forward: Any) -> bool:
    """Whether an instance's own ``forward`` is only its class's, bound.

    5.0 and 5.1 leave such a one on every module whose outputs they recorded. It would hide the
    forward of another class; to take it away changes nothing.
    """
    return getattr(forward, "__func__", None) is type(module).forward


def has_relative_positions(config: Any) -> bool:
    """Whether the attention itself knows positions (4.x: relative_key, relative_key_query)."""
    return getattr(config, "position_embedding_type", "absolute") not in ("absolute", None)
