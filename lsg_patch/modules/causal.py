"""The edges of a decoder's layer stack: what ``stack`` does, for tokens that see what is before them.

A decoder reads its input in steps: T tokens, after P whose keys and values are in a cache. Global
tokens see only each other, so they are the same at every step: they are prepended to the tokens of
each step and are not cached. The first step is laid out like an encoder's input; at later steps
tokens keep their places and see everything before them. Padding may be anywhere; the mask is over
all P + T tokens. As in ``stack``, a hook refers to no module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lsg_patch import compat
from lsg_patch.config import LSGConfig
from lsg_patch.families import Rotary
from lsg_patch.modules.arguments import Args, Argument, Kwargs
from lsg_patch.modules.layout import Layout, enter, lay_out, leave, with_globals_in_front
from lsg_patch.modules.stack import (
    EnterModel,
    LeaveModel,
    PrependGlobals,
    map_hidden_states,
    map_output,
)


def lay_out_step(mask: Tensor, length: int, config: LSGConfig) -> Layout:
    """The layout of the last ``length`` of the tokens that the padding mask (B, P + T) is over."""
    if mask.shape[1] == length:
        return lay_out(mask, length, config, mask.device, pool=_pools(config))
    if config.mask_first_token:
        first = mask.int().argmax(dim=1, keepdim=True)
        mask = mask & (torch.arange(mask.shape[1], device=mask.device) != first)
    rows = config.num_global_tokens + torch.arange(length, device=mask.device)[None]
    return Layout(mask, rows)


def enter_step(
    hidden: Tensor,
    mask: Tensor,
    config: LSGConfig,
    rotation: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Layout]:
    """``hidden`` (B, g + T, width), as the embeddings gave it, laid out for the stack.

    So is the ``rotation`` of its rows.
    """
    length = hidden.shape[1] - config.num_global_tokens
    if mask.shape[1] == length:
        return enter(hidden, mask, config, rotation, pool=_pools(config))
    return hidden, lay_out_step(mask, length, config)._replace(rotation=rotation)


def _pools(config: LSGConfig) -> bool:
    """Whether a global token's output takes the first token's place: only if that one is masked.

    Where it is seen, a global token, which sees no token, cannot say what follows it.
    """
    return bool(config.mask_first_token)


@dataclass(frozen=True)
class EnterCausalModel:
    """Before the base model: checks its input and keeps its masks compact.

    ``check`` is what a model that is no decoder has before it; ``states`` and ``states_mask`` are
    those of an encoder, where there is one.
    """

    check: EnterModel
    cache: Argument
    carrier: compat.CausalMaskCarrier
    states: Argument
    states_mask: Argument
    cross_mask: compat.CrossMask

    def __call__(self, base: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        check = self.check
        cached = compat.cached_length(self.cache.get(args, kwargs))
        given = check.checked_input(base, args, kwargs, cached)
        if given is None:
            return args, kwargs  # the model itself has an error for this
        mask = check.mask.get(args, kwargs)
        if mask is not None and mask.dim() == 4:
            raise ValueError(
                "attention_mask has four dimensions: generate makes such a one for a static cache, which "
                "a patched model has no use for; leave cache_implementation out"
            )
        mask = check.checked_mask(given, args, kwargs, cached)
        if mask is None:
            # of no mask the model would make a quadratic one
            mask = torch.ones(len(given), cached + given.shape[1], device=given.device)
        mask = mask.to(torch.bool)
        args, kwargs = check.mask.put(self.carrier.pack(mask), args, kwargs)
        head_mask = self.carrier.pack_as_head_mask(mask)
        if head_mask is not None:
            args, kwargs = check.head_mask.put(head_mask, args, kwargs)
        states, over_states = self.states.get(args, kwargs), self.states_mask.get(args, kwargs)
        if states is None or over_states is None:
            return args, kwargs
        over_states = self.cross_mask.of_one_query(base.config, over_states, states)
        return self.states_mask.put(over_states, args, kwargs)


@dataclass(frozen=True)
class EnterCausalStack:
    """Before the layer stack: global tokens come in, hidden states and the mask are laid out."""

    config: LSGConfig
    prepend: PrependGlobals | None
    carrier: compat.CausalMaskCarrier
    hidden: Argument
    mask: Argument
    head_mask: Argument
    rotary: Rotary | None
    of_globals: tuple[int, ...]

    def __call__(self, stack: Any, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        head_mask, mask = self.head_mask.get(args, kwargs), self.mask.get(args, kwargs)
        if head_mask is None and mask is None:
            raise ValueError(
                "the layer stack of a patched decoder got no mask, which its model makes: call the "
                "whole model, or unpatch it"
            )
        mask = self.carrier.unpack(mask, head_mask)
        hidden = self.hidden.get(args, kwargs)
        if self.prepend is not None:
            hidden = self.prepend(stack.lsg_base.module, hidden)
        hidden, layout = enter_step(hidden, mask, self.config, self._rotation(stack, hidden, mask))
        if head_mask is not None:
            # it has carried the mask; cross attention has no use for it
            args, kwargs = self.head_mask.put(None, args, kwargs)
        args, kwargs = self.hidden.put(hidden, args, kwargs)
        return self.mask.put(layout, args, kwargs)

    def _rotation(
        self, stack: nn.Module, hidden: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Of the global tokens and of this step's, the last that the mask (B, P + T) is over."""
        if self.rotary is None:
            return None
        num_global = len(self.of_globals)
        tokens = torch.arange(mask.shape[1], device=hidden.device)[None]
        positions = with_globals_in_front(tokens, mask, self.of_globals)
        first = positions.shape[1] - (hidden.shape[1] - num_global)
        own = torch.cat([positions[:, :num_global], positions[:, first:]], dim=1)
        return self.rotary.rotation(stack, own)


@dataclass(frozen=True)
class LeaveCausalStack:
    """After the layer stack: its output, and what it collected, in the input's order."""

    mask: Argument

    def __call__(self, stack: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        layout = self.mask.get(args, kwargs)
        return map_hidden_states(_leave_cross_attention(output, layout), lambda x: leave(x, layout))


@dataclass(frozen=True)
class LeaveCausalModel:
    """After the base model: what its own hooks recorded inside the stack, in the input's order.

    ``leave`` is what a model that is no decoder has after it.
    """

    leave: LeaveModel
    carrier: compat.CausalMaskCarrier

    def __call__(self, base: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        mask = self.carrier.unpack(self.leave.mask.get(args, kwargs), None)
        layout = lay_out_step(mask, output[0].shape[1], self.leave.config)
        output = _leave_cross_attention(output, layout)
        return self.leave.with_layout(layout, base, args, kwargs, output)


def _leave_cross_attention(output: Any, layout: Layout) -> Any:
    """The maps (B, H, g + T, S) over an encoder's states, the only ones there are, as (B, H, T, S)."""

    def changed(value: Any) -> Any:
        if isinstance(value, tuple) and value and all(_is_map(x) for x in value):
            return tuple(_leave_heads(x, layout) for x in value)
        return value

    return map_output(output, changed)


def _is_map(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4


def _leave_heads(x: Tensor, layout: Layout) -> Tensor:
    """``x`` (B, H, g + T, D) of the stack as (B, H, T0, D), in the input's order."""
    rows = leave(x.transpose(1, 2).flatten(2), layout)
    return rows.view(*rows.shape[:2], x.shape[1], x.shape[3]).transpose(1, 2)


@dataclass(frozen=True)
class KeptKeys:
    """Where a decoder's self-attention module has the keys and values of earlier tokens from.

    A cache holds those of the input's tokens, in the input's order, as the unpatched model's does.
    """

    cache: compat.KeyCache
    argument: Argument
    places: Argument
    num_global_tokens: int

    @classmethod
    def of(cls, attention: nn.Module, config: LSGConfig) -> KeptKeys:
        parameters = compat.forward_parameters(attention)
        cache = compat.KeyCache.of(attention)
        return cls(
            cache,
            Argument.of(parameters, cache.argument),
            Argument.of(parameters, "cache_position"),
            config.num_global_tokens,
        )

    def extend(
        self,
        attention: nn.Module,
        key: Tensor,
        value: Tensor,
        layout: Layout,
        args: Args,
        kwargs: Kwargs,
    ) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        """Of keys and values (B, H, g + T, D) those to attend to (B, H, g + P + T, D).

        And what the module is to return besides.
        """
        given = self.argument.get(args, kwargs)
        if given is None and not self.cache.is_tuple:
            return key, value, ()
        num_global, num_tokens = self.num_global_tokens, key.shape[2] - self.num_global_tokens
        all_keys, all_values, returned = self.cache.extend(
            attention,
            given,
            _leave_heads(key, layout),
            _leave_heads(value, layout),
            self.places.get(args, kwargs),
        )
        if layout.key_mask is None or layout.key_mask.shape[1] == num_tokens:
            return key, value, returned  # the first step: nothing but its own tokens, laid out
        key, value = (
            torch.cat([x[:, :, :num_global], kept[:, :, : layout.key_mask.shape[1]]], dim=2)
            for x, kept in ((key, all_keys), (value, all_values))
        )
        return key, value, returned
