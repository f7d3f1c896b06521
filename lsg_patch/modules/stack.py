"""The edges of the layer stack: global tokens and padding go in, and come out again.

All of it are hooks on the base model, its embeddings and its stack: outside every checkpointed
layer. A hook refers to no module, so that copies, pickles and replicas of a model work; what the
layers need travels as their mask argument, so that it is there when a layer runs again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lsg_patch import compat
from lsg_patch.attention import RelativeBias
from lsg_patch.attention.compiling import is_compiling, is_traced_to_onnx
from lsg_patch.config import LSGConfig
from lsg_patch.families import Rotary
from lsg_patch.modules.arguments import Args, Argument, Kwargs
from lsg_patch.modules.layout import (
    Layout,
    Packing,
    enter,
    lay_out,
    leave,
    packing_of,
    with_globals_in_front,
)
from lsg_patch.modules.link import Link


@dataclass(frozen=True)
class FirstWord:
    """The cls/bos token that the first token must be to be masked: an embedded input may differ."""

    words: str
    token_id: int

    def check(self, base: nn.Module, embeds: Tensor, mask: Tensor | None) -> None:
        """Warn if no row of ``embeds`` (B, T, width) begins with it: that token would be hidden."""
        if is_compiling() or embeds.is_meta or not embeds.numel():
            return
        row, at = torch.arange(len(embeds), device=embeds.device), torch.tensor(0)
        if mask is not None and mask.dim() == 2:
            at = mask.int().argmax(1)
        first = embeds[row, at.to(row)]
        token = torch.tensor([self.token_id], device=embeds.device)
        with torch.no_grad():
            word = base.get_submodule(self.words)(token).to(embeds)
        if not torch.isclose(first, word).all(-1).any():
            warnings.warn(
                f"inputs_embeds begin with another row than the token {self.token_id}: the first token "
                "is hidden from the others, a global token standing in for it. If it is a prompt or no "
                "cls/bos token, patch with mask_first_token=False",
                stacklevel=1,
            )


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
    cache: Argument
    first_word: FirstWord | None

    def __call__(self, base: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        if compat.cached_length(self.cache.get(args, kwargs)):
            raise ValueError(
                "past_key_values: an encoder that is patched takes no keys from outside, so prefix "
                "tuning is not supported; use LoRA, IA3 or prompt tuning, or unpatch_model(model)"
            )
        given = self.checked_input(base, args, kwargs)
        if given is None:
            return args, kwargs  # the model itself has an error for this
        if self.needs_head_mask:
            # of no effect but to keep the padding mask compact: the patched layers do not read it
            args, kwargs = self.head_mask.put(torch.ones(1, device=given.device), args, kwargs)
        mask = self.checked_mask(given, args, kwargs)
        if mask is None:
            return args, kwargs
        if self.four_dimensions:
            mask = mask[:, None, None, :].to(torch.bool)
        return self.mask.put(mask, args, kwargs)

    def checked_input(
        self, base: nn.Module, args: Args, kwargs: Kwargs, cached: int = 0
    ) -> Tensor | None:
        """The ids (B, T), or what is given in their place, after ``cached`` tokens."""
        if self.head_mask.get(args, kwargs) is not None:
            raise ValueError("head_mask is not supported while a model is patched: pass None")
        if wants(self.wants_attentions, base, args, kwargs):
            warnings.warn(
                "output_attentions: a model patched by lsg_patch computes no (T, T) attention maps; "
                "attentions are None",
                stacklevel=1,
            )
        if is_traced_to_onnx():
            warnings.warn(
                "torch.onnx.export(dynamo=False) fixes the batch size and the number of blocks to those of "
                "its example: pass dynamo=True, which gives one program for all sizes",
                stacklevel=1,
            )
        given: Tensor | None = self.ids.get(args, kwargs)
        if given is None:
            given = self.embeds.get(args, kwargs)
            if given is not None and self.first_word is not None:
                self.first_word.check(base, given, self.mask.get(args, kwargs))
        if given is not None:
            has_positions = self.positions.get(args, kwargs) is not None
            self._check_length(given.shape[1], has_positions, cached)
        return given

    def checked_mask(
        self, given: Tensor, args: Args, kwargs: Kwargs, cached: int = 0
    ) -> Tensor | None:
        """The padding mask (B, cached + T) of the input that is ``given``, if there is one."""
        mask = self.mask.get(args, kwargs)
        batch, length = given.shape[0], cached + given.shape[1]
        if mask is None:
            return None
        if mask.dim() != 2 or mask.shape[1] != length or mask.shape[0] not in (1, batch):
            raise ValueError(
                f"attention_mask must be (B, T) = {(batch, length)}, 1 for tokens and 0 for padding, "
                f"while a model is patched, not of shape {tuple(mask.shape)}"
            )
        return mask.expand(batch, length)  # type: ignore[no-any-return]

    def _check_length(self, length: int, has_positions: bool, cached: int) -> None:
        config, total = self.config, cached + length
        if length == 0:
            raise ValueError("the input has no tokens: its length is 0")
        if total > config.max_position_embeddings and not has_positions:
            raise ValueError(
                f"the input has {total} tokens, the patched model {config.max_position_embeddings} "
                "positions: truncate it, or patch with a larger max_position_embeddings"
            )
        if not config.adaptive and not cached and config.geometry().padded(length) != length:
            raise ValueError(
                f"adaptive=False and the input's {length} tokens are no multiple of "
                f"block_size={config.block_size}: pad it, or patch with adaptive=True"
            )


@dataclass(frozen=True)
class GivePositions:
    """Before a base model that turns positions itself: those of the global tokens as well."""

    positions: Argument
    ids: Argument
    embeds: Argument
    mask: Argument
    of_globals: tuple[int, ...]

    def __call__(self, base: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        given = self.ids.get(args, kwargs)
        given = self.embeds.get(args, kwargs) if given is None else given
        if given is None:
            return args, kwargs  # the model itself has an error for this
        tokens = self.positions.get(args, kwargs)
        if tokens is None:
            tokens = torch.arange(given.shape[1], device=given.device)[None]
        mask = as_padding_mask(self.mask.get(args, kwargs))
        return self.positions.put(
            with_globals_in_front(tokens, mask, self.of_globals), args, kwargs
        )


@dataclass(frozen=True)
class LinkStack:
    """Before the base model: its stack finds it, also where both are another's replicas."""

    stack: str

    def __call__(self, base: nn.Module, args: Args) -> None:
        stack: Any = base.get_submodule(self.stack)
        if stack.lsg_base.module is not base:
            stack.lsg_base = Link(base)


# on embedded tokens: the global tokens that belong to them, (B, g, width)
NOTE = "lsg_global_tokens"


@dataclass(frozen=True)
class GlobalTokens:
    """Global tokens for embedded ones, having passed what a word passes.

    Where the words of a row are scaled otherwise than usual, its global tokens are as well, but for
    what they have of a position: the rows ``places`` of the table ``positions``.
    """

    path: tuple[str, ...]
    positions: str | None
    places: tuple[int, ...]

    def of(self, embeddings: Any, embedded: Tensor, ratio: Tensor | None = None) -> Tensor:
        """(B, g, width) for ``embedded`` (B, T0, width), words being scaled ``ratio`` (B, 1, 1) times."""
        rows: Tensor = embeddings.global_embeddings(embedded)
        if ratio is not None:
            place: Tensor | float = 0.0
            if self.positions is not None:
                places = torch.tensor(self.places, device=rows.device)
                place = getattr(embeddings, self.positions)(places)
            rows = (place + ratio * (rows - place)).to(rows.dtype)
        for name in self.path:
            module = getattr(embeddings, name)
            rows = rows if module is None else module(rows)
        return rows


@dataclass(frozen=True)
class NoteGlobals:
    """After the embeddings: their global tokens are noted on what they give, for the stack.

    Here the ids are known, which words may be scaled by, and the weights are there (FSDP gathers
    those of a module for its forward).
    """

    tokens: GlobalTokens
    ids: Argument
    mask: Argument
    word_scale: Callable[[Any, Tensor | None, Tensor | None], Tensor | float]

    def __call__(self, embeddings: nn.Module, args: Args, kwargs: Kwargs, output: Tensor) -> Tensor:
        scale = self.word_scale(embeddings, self.ids.get(args, kwargs), self.mask.get(args, kwargs))
        ratio = None
        if isinstance(scale, Tensor):
            ratio = scale / self.word_scale(embeddings, None, None)
        elif is_compiling():
            return output  # not every compiler knows attributes of tensors
        rows = self.tokens.of(embeddings, output, ratio)
        if rows.requires_grad and not is_compiling():
            rows, output = _Together.apply(rows, output)
        setattr(output, NOTE, (rows, torch.is_grad_enabled()))
        return output


class _Together(torch.autograd.Function):
    """Two tensors as they are, whose gradients go on together: FSDP gathers a module's weights again
    when a gradient reaches what the module gave, which the noted rows are no part of.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        return rows.view_as(rows), embedded.view_as(embedded)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads


def carry_globals(projection: nn.Module, args: Args, output: Tensor) -> None:
    """After what embedded tokens pass between the embeddings and the stack: the noted ones pass it too."""
    rows, differentiable = getattr(args[0], NOTE, (None, None))
    if rows is not None:
        setattr(output, NOTE, (projection.forward(rows), differentiable))


@dataclass(frozen=True)
class PrependGlobals:
    """Prepend global tokens to embedded ones: those noted on the tensor, or, if a caller replaced the
    tensor or calls the stack alone, those of any input.
    """

    tokens: GlobalTokens
    embeddings: str
    projection: str | None

    def __call__(self, base: nn.Module, embedded: Tensor) -> Tensor:
        """(B, g + T0, width) of ``embedded`` (B, T0, width)."""
        rows, differentiable = getattr(embedded, NOTE, (None, None))
        if rows is not None and not is_compiling():
            delattr(embedded, NOTE)  # a tensor that is used again must not carry an old note
        if rows is None or differentiable != torch.is_grad_enabled():
            embeddings: Any = base.get_submodule(self.embeddings)
            rows = self.tokens.of(embeddings.lsg_self.module, embedded)
            if self.projection is not None:
                rows = getattr(base, self.projection)(rows)
        return torch.cat([rows.to(embedded), embedded], dim=1)


@dataclass(frozen=True)
class CompactMask:
    """Before embeddings that read the padding mask: (B, T), as they do unpatched."""

    mask: Argument

    def __call__(self, embeddings: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        mask = as_padding_mask(self.mask.get(args, kwargs))
        return (args, kwargs) if mask is None else self.mask.put(mask, args, kwargs)


@dataclass(frozen=True)
class EnterStack:
    """Before the layer stack: global tokens come in, hidden states and the mask are laid out.

    With ``rotary`` positions their rotation is as well, which the base model hands to the stack as
    ``rotation``, or which is made here. ``relative_bias`` gives the table of a ``RelativeBias``, of
    the stack; ``of_globals`` are the positions of the global tokens.
    """

    config: LSGConfig
    prepend: PrependGlobals | None
    hidden: Argument
    mask: Argument
    rotation: Argument
    rotary: Rotary | None
    relative_bias: Callable[[Any], Tensor] | None
    of_globals: tuple[int, ...]

    def __call__(self, stack: Any, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        hidden = self.hidden.get(args, kwargs)
        mask = as_padding_mask(self.mask.get(args, kwargs))
        length = hidden.shape[1]
        if mask is not None and mask.shape[1] != length:
            raise ValueError(
                f"the layer stack got {length} hidden states and a mask of {mask.shape[1]} tokens: "
                "they must be as many"
            )
        if self.prepend is not None:
            hidden = self.prepend(stack.lsg_base.module, hidden)

        def positions() -> Tensor:
            tokens = torch.arange(length, device=hidden.device)[None]
            return with_globals_in_front(tokens, mask, self.of_globals)

        rotation = bias = None
        if self.rotary is not None:
            given = self.rotation.get(args, kwargs)
            if given is not None:  # every angle is there twice, for both elements of a pair
                cos, sin = (part[..., : part.shape[-1] // 2] for part in given)
                rotation = cos, sin
            else:
                rotation = self.rotary.rotation(stack, positions())
        if self.relative_bias is not None:
            bias = RelativeBias(self.relative_bias(stack), positions())
        hidden, layout = enter(hidden, mask, self.config, rotation, bias)
        args, kwargs = self.hidden.put(hidden, args, kwargs)
        return self.mask.put(layout, args, kwargs)


def leave_out(*args: Any, **kwargs: Any) -> None:
    """In place of a method of the stack that would make (T, T) tensors for its layers."""


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

        return map_output(output, give_back)


@dataclass(frozen=True)
class LeaveModel:
    """After the base model: hidden states that its own hooks recorded inside the stack."""

    config: LSGConfig
    mask: Argument
    wants_attentions: Argument
    num_layers: int

    def __call__(self, base: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        last = output[0]
        values = output if isinstance(output, tuple) else output.values()
        layout = packing = None
        if any(_are_hidden_states(value) for value in values):
            mask = as_padding_mask(self.mask.get(args, kwargs))
            layout = lay_out(mask, last.shape[1], self.config, last.device)
            packing = packing_of(mask, self.config)
        return self.with_layout(layout, base, args, kwargs, output, packing)

    def with_layout(
        self,
        layout: Layout | None,
        base: nn.Module,
        args: Args,
        kwargs: Kwargs,
        output: Any,
        packing: Packing | None = None,
    ) -> Any:
        """``output`` of a model whose input lay in the stack as ``layout`` or ``packing`` says; None
        where it has no hidden states.
        """
        last = output[0]

        def given_back(x: Tensor) -> Tensor:
            assert layout is not None
            # a stack that is compiled by itself is not packed: the states themselves tell
            if packing is not None and x.shape[:2] == (1, len(packing.taken)):
                return leave(x, packing.layout)
            return leave(x, layout)

        def give_back(value: Any) -> Any:
            if _are_hidden_states(value):
                # the last one was replaced by the output, which has left the stack already
                return tuple(x if x is None or x is last else given_back(x) for x in value)
            return value

        if layout is not None:
            output = map_output(output, give_back)
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

    return map_output(output, changed)


def _are_hidden_states(value: Any) -> bool:
    # None: a hidden state that was not requested (5.23 takes a list of layers)
    return (
        isinstance(value, (tuple, list))
        and any(x is not None for x in value)
        and all(x is None or (isinstance(x, Tensor) and x.dim() == 3) for x in value)
    )


def map_output(output: Any, change: Any) -> Any:
    """``change`` applied to the values of a model output, of a tuple, or of a lone tensor."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, tuple):
        return tuple(change(value) for value in output)
    return type(output)(**{name: change(value) for name, value in output.items()})
