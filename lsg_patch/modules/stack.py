"""The edges of the layer stack: global tokens and padding go in, and come out again.

All of it are hooks on the base model, its embeddings and its stack: outside every checkpointed
layer. A hook refers to no module, so that copies, pickles and replicas of a model work; what the
layers need travels as their mask argument, so that it is there when a layer runs again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsg_patch.config import LSGConfig
from lsg_patch.modules.arguments import Args, Argument, Kwargs


class Layout(NamedTuple):
    """How a batch lies in the stack; the layers receive it in place of a padding mask.

    A row of the stack is [global tokens | the row's tokens from its first real one on | padding];
    in short inputs whose first token is masked, the first global token stands in its very place.
    Padding on the left is turned to the right side: then blocks begin where the text begins, and
    results do not depend on how much padding there was.

    Attributes:
        key_mask: (1 or B, T) over the tokens of the stack, True where one is seen as a key; None:
            all are seen.
        rows: (1 or B, T0): the stack's row that each token of the input is given back from.
    """

    key_mask: Tensor | None
    rows: Tensor


class Placement(NamedTuple):
    """Where the tokens of an input (B, T0) go.

    Attributes:
        first: (1 or B, 1), each row's first real token.
        tokens: (1 or B, T), the input's token in each place of the stack; what stands in a place of
            padding means nothing.
        stood_in: 1 where the first token gets no place, because a global token stands in for it.
    """

    first: Tensor
    tokens: Tensor
    stood_in: int


def place(mask: Tensor | None, length: int, config: LSGConfig, device: torch.device) -> Placement:
    """Places for inputs of ``length`` tokens with the padding mask (B, length), True for tokens."""
    geometry = config.geometry()
    # beyond two blocks it keeps its place, which the blocks are counted from; a decoder that sees the
    # global tokens sees it as well
    is_short = length <= geometry.full_length
    stood_in = int(
        bool(config.mask_first_token) and is_short and not config.pass_global_tokens_to_decoder
    )
    if mask is None:
        first = torch.zeros(1, 1, dtype=torch.long, device=device)
    else:
        first = mask.int().argmax(dim=1, keepdim=True)
    slots = torch.arange(geometry.padded(length) - stood_in, device=device)
    return Placement(first, (slots + first + stood_in) % length, stood_in)


def lay_out(
    mask: Tensor | None, length: int, config: LSGConfig, device: torch.device, pool: bool = True
) -> Layout:
    """The layout of inputs of ``length`` tokens with the padding mask (B, length), True for tokens.

    ``pool=False``: each token is given back from its own row, whatever ``config`` says.
    """
    return _layout(mask, length, config, place(mask, length, config, device), pool)


def _layout(
    mask: Tensor | None, length: int, config: LSGConfig, placement: Placement, pool: bool = True
) -> Layout:
    first, tokens, stood_in = placement
    slots = torch.arange(tokens.shape[1], device=tokens.device)
    hides_first = config.mask_first_token and not stood_in
    key_mask = None
    if mask is not None or hides_first or tokens.shape[1] > length:
        key_mask = (slots < length - stood_in)[None]
        if mask is not None:
            key_mask = key_mask & mask.gather(1, tokens)
        if hides_first:
            key_mask = key_mask & (slots > 0)
    position = torch.arange(length, device=tokens.device)[None]
    rows = config.num_global_tokens - stood_in + (position - first) % length
    if pool and config.pool_with_global and config.num_global_tokens:
        # the first global token stands in for the first real one, and for padding before it
        rows = rows.masked_fill(position <= first, 0)
    return Layout(key_mask, rows)


def enter(hidden: Tensor, mask: Tensor | None, config: LSGConfig) -> tuple[Tensor, Layout]:
    """``hidden`` (B, g + T0, width), as the embeddings gave it, laid out for the stack."""
    num_global = config.num_global_tokens
    length = hidden.shape[1] - num_global
    placement = place(mask, length, config, hidden.device)
    layout = _layout(mask, length, config, placement)
    missing = placement.tokens.shape[1] - length
    if mask is None and missing >= 0:
        return (F.pad(hidden, (0, 0, 0, missing)) if missing else hidden), layout
    globals_ = torch.arange(num_global, device=hidden.device).expand(len(placement.tokens), -1)
    return _take_rows(hidden, torch.cat([globals_, num_global + placement.tokens], dim=1)), layout


def leave(hidden: Tensor, layout: Layout) -> Tensor:
    """``hidden`` (B, g + T, width) of the stack as (B, T0, width), in the input's order."""
    return _take_rows(hidden, layout.rows)


@dataclass(frozen=True)
class EnterModel:
    """Before the base model: checks its input and keeps the padding mask compact."""

    config: LSGConfig
    ids: Argument
    embeds: Argument
    mask: Argument
    positions: Argument
    head_mask: Argument
    wants_attentions: Argument
    four_dimensions: bool
    needs_head_mask: bool

    def __call__(self, base: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        if self.head_mask.get(args, kwargs) is not None:
            raise ValueError("head_mask is not supported while a model is patched: pass None")
        if wants(self.wants_attentions, base, args, kwargs):
            warnings.warn(
                "output_attentions: a model patched by lsg_patch computes no (T, T) attention maps; "
                "attentions are None",
                stacklevel=1,
            )
        given = self.ids.get(args, kwargs)
        given = self.embeds.get(args, kwargs) if given is None else given
        if given is None:
            return args, kwargs  # the model itself has an error for this
        batch, length = given.shape[:2]
        self._check_length(length, self.positions.get(args, kwargs) is not None)
        if self.needs_head_mask:
            # of no effect but to keep the padding mask compact: the patched layers do not read it
            args, kwargs = self.head_mask.put(torch.ones(1, device=given.device), args, kwargs)
        mask = self.mask.get(args, kwargs)
        if mask is None:
            return args, kwargs
        if mask.dim() != 2 or mask.shape[1] != length or mask.shape[0] not in (1, batch):
            raise ValueError(
                f"attention_mask must be (B, T) = {(batch, length)}, 1 for tokens and 0 for padding, "
                f"while a model is patched, not of shape {tuple(mask.shape)}"
            )
        mask = mask.expand(batch, length)
        if self.four_dimensions:
            mask = mask[:, None, None, :].to(torch.bool)
        return self.mask.put(mask, args, kwargs)

    def _check_length(self, length: int, has_positions: bool) -> None:
        config = self.config
        if length == 0:
            raise ValueError("the input has no tokens: its length is 0")
        if length > config.max_position_embeddings and not has_positions:
            raise ValueError(
                f"the input has {length} tokens, the patched model {config.max_position_embeddings} "
                "positions: truncate it, or patch with a larger max_position_embeddings"
            )
        if not config.adaptive and config.geometry().padded(length) != length:
            raise ValueError(
                f"adaptive=False and the input's {length} tokens are no multiple of "
                f"block_size={config.block_size}: pad it, or patch with adaptive=True"
            )


@dataclass(frozen=True)
class PrependGlobals:
    """After the embeddings: global tokens in front, having passed what a word passes."""

    path: tuple[str, ...]

    def __call__(self, embeddings: nn.Module, args: Args, output: Tensor) -> Tensor:
        rows: Tensor = embeddings.global_embeddings(len(output))  # type: ignore[operator]
        for name in self.path:
            rows = getattr(embeddings, name)(rows)
        return torch.cat([rows.to(output.dtype), output], dim=1)


@dataclass(frozen=True)
class EnterStack:
    """Before the layer stack: hidden states and the mask argument are laid out."""

    config: LSGConfig
    hidden: Argument
    mask: Argument

    def __call__(self, stack: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        hidden = self.hidden.get(args, kwargs)
        mask = as_padding_mask(self.mask.get(args, kwargs))
        length = hidden.shape[1] - self.config.num_global_tokens
        if mask is not None and mask.shape[1] != length:
            raise ValueError(
                f"the layer stack got {hidden.shape[1]} hidden states and a mask of {mask.shape[1]} "
                f"tokens: {self.config.num_global_tokens} more are needed, the global tokens that the "
                "patched embeddings give. Call the whole model, or unpatch it"
            )
        hidden, layout = enter(hidden, mask, self.config)
        args, kwargs = self.hidden.put(hidden, args, kwargs)
        return self.mask.put(layout, args, kwargs)


@dataclass(frozen=True)
class LeaveStack:
    """After the layer stack: its output, and hidden states that it collected, in the input's order."""

    mask: Argument
    collects_hidden_states: bool

    def __call__(self, stack: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        layout = self.mask.get(args, kwargs)

        def give_back(value: Any) -> Any:
            if isinstance(value, Tensor):
                return leave(value, layout)
            if self.collects_hidden_states and _are_hidden_states(value):
                return tuple(None if x is None else leave(x, layout) for x in value)
            return value

        return _map_output(output, give_back)


@dataclass(frozen=True)
class LeaveModel:
    """After the base model: hidden states that its own hooks recorded inside the stack."""

    config: LSGConfig
    mask: Argument
    wants_attentions: Argument
    num_layers: int

    def __call__(self, base: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        last = output[0]
        mask = as_padding_mask(self.mask.get(args, kwargs))
        layout = lay_out(mask, last.shape[1], self.config, last.device)

        def give_back(value: Any) -> Any:
            if _are_hidden_states(value):
                # the last one was replaced by the output, which has left the stack already
                return tuple(x if x is None or x is last else leave(x, layout) for x in value)
            return value

        output = _map_output(output, give_back)
        if not isinstance(output, tuple) and wants(self.wants_attentions, base, args, kwargs):
            output["attentions"] = (None,) * self.num_layers
        return output


def wants(argument: Argument, base: nn.Module, args: Args, kwargs: Kwargs) -> bool:
    """Whether an output was asked for, in the call or else in the model's config."""
    value = argument.get(args, kwargs)
    return bool(getattr(base.config, argument.name, False) if value is None else value)


def as_padding_mask(mask: Tensor | None) -> Tensor | None:
    """(B, T), True for tokens, of a mask as models hand them to their layers.

    It is (B, T), 1 for tokens, or (B, 1, 1 or T, T), boolean or to be added to scores.
    """
    if mask is None:
        return None
    if mask.dim() != 4:
        return mask.to(torch.bool)
    mask = mask[:, 0, -1]
    return mask > -1 if mask.is_floating_point() else mask.to(torch.bool)


def map_hidden_states(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``change`` applied to every hidden state of an encoder's output, lone or among others."""

    def changed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if _are_hidden_states(value):
            return tuple(None if x is None else change(x) for x in value)
        return value

    return _map_output(output, changed)


def _take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows (1 or B, n) of ``x`` (B, m, width), as (B, n, width)."""
    if len(rows) == 1:
        return x.index_select(1, rows[0])
    batch, length, width = x.shape
    flat = rows + length * torch.arange(batch, device=x.device)[:, None]
    return x.reshape(batch * length, width).index_select(0, flat.flatten()).view(*rows.shape, width)


def _are_hidden_states(value: Any) -> bool:
    # None stands for one that was not asked for (5.23 takes a list of layers)
    return (
        isinstance(value, (tuple, list))
        and any(x is not None for x in value)
        and all(x is None or (isinstance(x, Tensor) and x.dim() == 3) for x in value)
    )


def _map_output(output: Any, change: Any) -> Any:
    """``change`` applied to the values of a model output, of a tuple, or of a lone tensor."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, tuple):
        return tuple(change(value) for value in output)
    return type(output)(**{name: change(value) for name, value in output.items()})
