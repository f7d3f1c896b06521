"""The edges of an encoder that embeds its input itself: what ``stack`` does, with other hooks.

Such an encoder has no place between its embeddings and its layers, so its input is made ready
before it: embedded, with positions, global tokens in front, and laid out. The encoder gets the
result as ``inputs_embeds``, and its position table adds nothing to it. The padding mask goes on
with the layers' arguments, from which each self-attention module makes the ``Layout`` again.
As in ``stack``, a hook refers to no module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lsg_patch import compat
from lsg_patch.config import LSGConfig
from lsg_patch.modules.arguments import Args, Argument, Kwargs
from lsg_patch.modules.layout import enter, lay_out, leave
from lsg_patch.modules.stack import EnterModel, as_padding_mask, map_hidden_states, wants


@dataclass(frozen=True)
class EnterEncoder:
    """Before the encoder: its input is checked, embedded, laid out, and its mask kept compact.

    ``check`` is what a model with an inner stack has before it; ``words`` and ``positions`` are the
    names of the tables.
    """

    config: LSGConfig
    check: EnterModel
    carrier: compat.MaskCarrier
    carried: Argument
    words: str
    positions: str
    position_input: compat.PositionInput

    def __call__(self, encoder: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        args, kwargs = self.check(encoder, args, kwargs)
        ids, embeds = self.check.ids.get(args, kwargs), self.check.embeds.get(args, kwargs)
        if (ids is None) == (embeds is None):
            return args, kwargs  # the encoder itself has an error for this
        if embeds is None:
            scale = compat.scale_of_looked_up_words(encoder)
            embeds = getattr(encoder, self.words)(ids) * scale
        mask = as_padding_mask(self.check.mask.get(args, kwargs))
        hidden, _ = enter(self._with_globals(encoder, embeds), mask, self.config)
        if mask is None:
            # it also tells the length, which hidden states that are laid out do not
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        args, kwargs = self.check.ids.put(None, args, kwargs)
        args, kwargs = self.check.embeds.put(hidden, args, kwargs)
        args, kwargs = self.check.mask.put(None, args, kwargs)
        return self.carried.put(self.carrier.pack(mask), args, kwargs)

    def _with_globals(self, encoder: nn.Module, embeds: Tensor) -> Tensor:
        """Words (B, T0, width) with their positions, and global tokens: (B, g + T0, width)."""
        # by forward: the hooks on this table return zeros
        places = getattr(encoder, self.positions).forward(
            self.position_input.like(embeds[:1, :, -1])
        )
        hidden: Tensor = embeds + places.to(embeds.device)
        if not self.config.num_global_tokens:
            return hidden
        rows: Tensor = encoder.global_embeddings(hidden)  # type: ignore[operator]
        return torch.cat([rows.to(hidden), hidden], dim=1)


@dataclass(frozen=True)
class FirstPosition:
    """Before the position table: one position is enough, and there is always one."""

    position_input: compat.PositionInput

    def __call__(self, positions: nn.Module, args: Args) -> Args:
        return (self.position_input.one_token(args[0]), *args[1:])


def no_positions(positions: nn.Module, args: Args, output: Tensor) -> Tensor:
    """After the position table: nothing is added to what has its positions already."""
    return torch.zeros_like(output)


@dataclass(frozen=True)
class GiveLayout:
    """Before a self-attention module: the mask that was handed on becomes its ``Layout``."""

    config: LSGConfig
    carrier: compat.MaskCarrier
    carried: Argument
    mask: Argument

    def __call__(self, attention: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        given = self.carried.get(args, kwargs)
        if given is None:
            return args, kwargs  # a layer called alone: the module has an error for this
        mask = self.carrier.unpack_in_layer(given)
        layout = lay_out(mask, mask.shape[1], self.config, mask.device)
        return self.mask.put(layout, args, kwargs)


@dataclass(frozen=True)
class LeaveEncoder:
    """After the encoder: its outputs (B, T0, width) in the input's order.

    With ``pass_global_tokens_to_decoder`` (B, g + T0, width): the global tokens stay in front, and
    no token is replaced by one of them.
    """

    config: LSGConfig
    carrier: compat.MaskCarrier
    carried: Argument
    wants_attentions: Argument
    num_layers: int

    def __call__(self, encoder: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        mask = self.carrier.unpack(self.carried.get(args, kwargs))
        keep = self.config.pass_global_tokens_to_decoder
        layout = lay_out(mask, mask.shape[1], self.config, mask.device, pool=not keep)
        if keep:
            first = torch.arange(self.config.num_global_tokens, device=mask.device)
            rows = torch.cat([first.expand(len(layout.rows), -1), layout.rows], dim=1)
            layout = layout._replace(rows=rows)
        output = map_hidden_states(output, lambda x: leave(x, layout))
        if not isinstance(output, tuple) and wants(self.wants_attentions, encoder, args, kwargs):
            output["attentions"] = (None,) * self.num_layers
        return output


@dataclass(frozen=True)
class EnterDecoder:
    """Before the decoder, where it sees the global tokens: its mask over the encoder's output.

    Where the first token is masked, the decoder does not see it either: it sees the global token
    that replaces it, with or without a mask.
    """

    config: LSGConfig
    states: Argument
    mask: Argument

    def __call__(self, decoder: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        states, mask = self.states.get(args, kwargs), self.mask.get(args, kwargs)
        num_global = self.config.num_global_tokens
        if states is None or (mask is None and not self.config.mask_first_token):
            return args, kwargs
        length = states.shape[1] - num_global
        if mask is None:
            mask = torch.ones(len(states), length, dtype=torch.long, device=states.device)
        if mask.dim() != 2 or mask.shape[1] != length:
            return args, kwargs  # made for these states already, or the decoder has an error for it
        if self.config.mask_first_token:
            first = mask.int().argmax(dim=1, keepdim=True)
            mask = mask.scatter(1, first, 0)
        mask = torch.cat([mask.new_ones(len(mask), num_global), mask], dim=1)
        return self.mask.put(mask, args, kwargs)
