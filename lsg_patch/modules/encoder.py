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
from lsg_patch.compat import Args, Kwargs, Signature
from lsg_patch.config import LSGConfig
from lsg_patch.modules.layout import enter, lay_out
from lsg_patch.modules.stack import CheckInput, in_order, wants_attentions


@dataclass(frozen=True)
class EnterEncoder:
    """Before the encoder: its input is checked, embedded, laid out, and its mask kept compact.

    ``words`` and ``positions`` are the names of the tables, the latter of which ``takes_shape`` or ids.
    """

    check: CheckInput
    carrier: compat.MaskCarrier
    words: str
    positions: str
    takes_shape: bool

    def __call__(self, encoder: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        call, config = self.check.call, self.check.config
        _, mask, _ = self.check(encoder, args, kwargs)
        ids, embeds = (call.get(name, args, kwargs) for name in ("input_ids", "inputs_embeds"))
        if (ids is None) == (embeds is None):
            return args, kwargs  # the encoder itself has an error for this
        if embeds is None:
            embeds = getattr(encoder, self.words)(ids) * compat.scale_of_looked_up_words(encoder)
        mask = compat.padding_mask(mask)
        hidden, _ = enter(self._with_globals(encoder, embeds), mask, config)
        if mask is None:
            # it also tells the length, which hidden states that are laid out do not
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        packed = self.carrier.pack(call, mask, embeds.device)
        return call.put({"input_ids": None, "inputs_embeds": hidden, **packed}, args, kwargs)

    def _with_globals(self, encoder: nn.Module, embeds: Tensor) -> Tensor:
        """Words (B, T0, width) with their positions, and global tokens: (B, g + T0, width)."""
        like = embeds[:1, :, -1:]  # of three dimensions: the hooks on this table leave these alone
        table: Any = getattr(encoder, self.positions)
        # by forward: the hooks of others see what the encoder asks for, once
        positions = table.forward(like.shape if self.takes_shape else like)
        hidden: Tensor = embeds + positions.to(embeds.device)
        if not self.check.config.num_global_tokens:
            return hidden
        rows: Tensor = encoder.global_embeddings(hidden)  # type: ignore[operator]
        return torch.cat([rows.to(hidden), hidden], dim=1)


def first_position(positions: nn.Module, args: Args) -> Args:
    """Before the position table: one position is enough, and there is always one."""
    return args if _asks_for_all(args) else (compat.one_position(args[0]), *args[1:])


def no_positions(positions: nn.Module, args: Args, output: Tensor) -> Tensor:
    """After the position table: nothing is added to what has its positions already."""
    return output if _asks_for_all(args) else torch.zeros_like(output)


def _asks_for_all(args: Args) -> bool:
    """Whether it is ``EnterEncoder`` that asks, also through what is put around the table."""
    return len(args[0] if isinstance(args[0], tuple) else args[0].shape) == 3


@dataclass(frozen=True)
class GiveLayout:
    """Before a self-attention module: the mask that was handed on becomes its ``Layout``."""

    config: LSGConfig
    call: Signature

    def __call__(self, attention: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        carried = self.call.get("layer_head_mask", args, kwargs)  # a part of the encoder's
        given = self.call.get(self.call.mask, args, kwargs) if carried is None else carried
        if carried is None and given is not None and given.dim() == 4 and given.shape[2] > 1:
            raise RuntimeError(
                "the encoder's own forward was called past the patch: call it by super().forward, and wrap "
                "encoder.forward after the model is patched"
            )
        mask = compat.padding_mask(given)
        if mask is None:
            return args, kwargs  # a layer called alone: the module has an error for this
        layout = lay_out(mask, mask.shape[1], self.config, mask.device)
        return self.call.put({self.call.mask: layout}, args, kwargs)


@dataclass(frozen=True)
class LeaveEncoder:
    """After the encoder: its outputs (B, T0, width) in the input's order.

    With ``pass_global_tokens_to_decoder`` (B, g + T0, width): the global tokens stay in front, and
    no token is replaced by one of them.
    """

    config: LSGConfig
    call: Signature
    num_layers: int

    def __call__(self, encoder: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        carriers = (self.call.get(name, args, kwargs) for name in (self.call.mask, "head_mask"))
        mask: Any = compat.padding_mask(*carriers)
        keep = self.config.pass_global_tokens_to_decoder
        rows = lay_out(mask, mask.shape[1], self.config, mask.device, pool=not keep).rows
        if keep:
            first = torch.arange(self.config.num_global_tokens, device=mask.device)
            rows = torch.cat([first.expand(rows.shape[0], -1), rows], dim=1)
        output = in_order(output, rows)
        if not isinstance(output, tuple) and wants_attentions(self.call, encoder, args, kwargs):
            output["attentions"] = (None,) * self.num_layers
        return output


@dataclass(frozen=True)
class EnterDecoder:
    """Before the decoder, where it sees the global tokens: its mask over the encoder's output.

    Where the first token is masked, the decoder does not see it either: it sees the global token
    that replaces it, with or without a mask.
    """

    config: LSGConfig
    call: Signature

    def __call__(self, decoder: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        states = self.call.get("encoder_hidden_states", args, kwargs)
        mask = self.call.get("encoder_attention_mask", args, kwargs)
        num_global = self.config.num_global_tokens
        if states is None or (mask is None and not self.config.mask_first_token):
            return args, kwargs
        length = states.shape[1] - num_global
        if mask is None:
            mask = torch.ones(states.shape[0], length, dtype=torch.long, device=states.device)
        if mask.dim() != 2 or mask.shape[1] != length:
            return args, kwargs  # made for these states already, or the decoder has an error for it
        if self.config.mask_first_token:
            first = mask.int().argmax(dim=1, keepdim=True)
            mask = mask.scatter(1, first, 0)
        mask = torch.cat([mask.new_ones(mask.shape[0], num_global), mask], dim=1)
        return self.call.put({"encoder_attention_mask": mask}, args, kwargs)
