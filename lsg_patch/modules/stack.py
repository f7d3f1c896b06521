"""The edges of the layer stack: global tokens and padding go in, and come out again.

All of it are hooks on the base model, its embeddings and its stack: outside every checkpointed
layer. A hook refers to no module, so that copies, pickles and replicas of a model work; what the
layers need travels as their mask argument, so that it is there when a layer runs again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lsg_patch import compat
from lsg_patch.attention import RelativeBias
from lsg_patch.attention.compiling import is_compiling, is_traced_to_onnx
from lsg_patch.attention.functional import seen_by
from lsg_patch.compat import Args, Kwargs, Signature
from lsg_patch.config import LSGConfig
from lsg_patch.families import Rotary
from lsg_patch.modules.causal import change_heads, lay_out_step
from lsg_patch.modules.layout import Layout, enter, packing_of, take_rows, with_globals_in_front
from lsg_patch.modules.link import Link


@dataclass(frozen=True)
class CheckInput:
    """What a model, or an encoder that embeds its input, is given: checked before it runs.

    Of a decoder (``is_causal``) the input may come after tokens that are in a cache. ``first_word`` is
    the cls/bos token that the first token must be to be masked, and ``words`` the path of its table.
    """

    config: LSGConfig
    call: Signature
    words: str
    first_word: int | None
    is_causal: bool

    def __call__(
        self, base: nn.Module, args: Args, kwargs: Kwargs
    ) -> tuple[Tensor | None, Tensor | None, int]:
        """The ids (B, T), or what is given in their place, the padding mask (B, P + T), and P.

        None for the first where the model itself has an error.
        """
        cached = compat.cached_length(self.call.get("past_key_values", args, kwargs))
        if cached and not self.is_causal:
            raise ValueError(
                "past_key_values: an encoder that is patched takes no keys from outside, so prefix "
                "tuning is not supported; use LoRA, IA3 or prompt tuning, or unpatch_model(model)"
            )
        if self.call.get("head_mask", args, kwargs) is not None:
            raise ValueError("head_mask is not supported while a model is patched: pass None")
        if wants_attentions(self.call, base, args, kwargs):
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
        given, mask = input_of(self.call, args, kwargs), self.call.get(self.call.mask, args, kwargs)
        if given is None:
            return None, None, cached
        if self.first_word is not None and self.call.get("input_ids", args, kwargs) is None:
            self._check_first_word(base, given, mask, self.first_word)
        has_positions = self.call.get("position_ids", args, kwargs) is not None
        self._check_length(given.shape[1], has_positions, cached)
        return given, self._checked_mask(mask, given.shape[0], cached + given.shape[1]), cached

    def _checked_mask(self, mask: Tensor | None, batch: int, length: int) -> Tensor | None:
        if mask is None:
            return None
        if self.is_causal and mask.dim() == 4:
            raise ValueError(
                "attention_mask has four dimensions: generate makes such a one for a static cache, which "
                "a patched model has no use for; leave cache_implementation out"
            )
        if mask.dim() != 2 or mask.shape[1] != length or mask.shape[0] not in (1, batch):
            raise ValueError(
                f"attention_mask must be (B, T) = {(batch, length)}, 1 for tokens and 0 for padding, "
                f"while a model is patched, not of shape {tuple(mask.shape)}"
            )
        seen_by(mask, "attention_mask")
        return mask.expand(batch, length)

    def _check_first_word(
        self, base: nn.Module, embeds: Tensor, mask: Tensor | None, token_id: int
    ) -> None:
        """Warn if no row of ``embeds`` (B, T, width) begins with it: that token would be hidden."""
        if is_compiling() or embeds.is_meta or not embeds.numel():
            return
        row = torch.arange(len(embeds), device=embeds.device)
        at = torch.zeros_like(row)
        if mask is not None and mask.dim() == 2:
            at = mask.int().argmax(1).to(row)
        first = embeds[row, at]
        token = torch.tensor([token_id], device=embeds.device)
        with torch.no_grad():
            word = base.get_submodule(self.words)(token).to(embeds)
        if not torch.isclose(first, word).all(-1).any():
            warnings.warn(
                f"inputs_embeds begin with another row than the token {token_id}: the first token "
                "is hidden from the others, and a global token replaces it. If it is a prompt or no "
                "cls/bos token, patch with mask_first_token=False",
                stacklevel=1,
            )

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


def input_of(call: Signature, args: Args, kwargs: Kwargs) -> Any:
    """The ids (B, T) of a call, or embedded words (B, T, width)."""
    ids = call.get("input_ids", args, kwargs)
    return call.get("inputs_embeds", args, kwargs) if ids is None else ids


@dataclass(frozen=True)
class EnterModel:
    """Before the base model: checks its input and keeps the padding mask compact.

    ``cross_mask`` does so with the mask over an encoder's states, in a decoder.
    """

    check: CheckInput
    carrier: compat.MaskCarrier
    cross_mask: compat.CrossMask | None

    def __call__(self, base: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        call = self.check.call
        given, mask, cached = self.check(base, args, kwargs)
        if given is None:
            return args, kwargs
        if mask is None and self.check.is_causal:
            # of no mask a decoder would make a quadratic one
            mask = torch.ones(given.shape[0], cached + given.shape[1], device=given.device)
        changed = self.carrier.pack(call, mask, given.device)
        if self.cross_mask is not None:
            states = call.get("encoder_hidden_states", args, kwargs)
            over_states = call.get("encoder_attention_mask", args, kwargs)
            if states is not None and over_states is not None:
                compact = self.cross_mask.of_one_query(base.config, over_states, states)
                changed["encoder_attention_mask"] = compact
        return call.put(changed, args, kwargs)


@dataclass(frozen=True)
class GivePositions:
    """Before a base model that turns positions itself: those of the global tokens as well."""

    call: Signature
    of_globals: tuple[int, ...]

    def __call__(self, base: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        given = input_of(self.call, args, kwargs)
        if given is None:
            return args, kwargs  # the model itself has an error for this
        tokens = self.call.get("position_ids", args, kwargs)
        if tokens is None:
            tokens = torch.arange(given.shape[1], device=given.device)[None]
        mask = compat.padding_mask(self.call.get(self.call.mask, args, kwargs))
        positions = with_globals_in_front(tokens, mask, self.of_globals)
        return self.call.put({"position_ids": positions}, args, kwargs)


@dataclass(frozen=True)
class LinkStack:
    """Before the base model: its stack finds it, also where both are another's replicas."""

    stack: str

    def __call__(self, base: nn.Module, args: Args) -> None:
        stack: Any = base.get_submodule(self.stack)
        if stack.lsg_base.module is not base:
            stack.lsg_base = Link(base)


# on embedded tokens: the global tokens (B, g, width) that belong to them, whether gradients are to reach
# these, and whether the stack has taken them
NOTE = "lsg_global_tokens"
# how the words of these are scaled, (B, 1, 1), where a hook of others gave a tensor without the note
_RATIO: ContextVar[Tensor | None] = ContextVar("ratio", default=None)


@dataclass(frozen=True)
class GlobalTokens:
    """Global tokens for embedded ones, having passed what a word passes.

    Where the words of a row are scaled otherwise than usual, its global tokens are as well, but for
    what they have of a position: ``position_rows`` of the table ``positions``. The modules of
    ``path`` are in the ``embeddings`` of the base model, which has the ``projection`` too, if any.
    """

    embeddings: str
    path: tuple[str, ...]
    positions: str | None
    position_rows: tuple[int, ...]
    projection: str | None

    def of(self, embeddings: Any, embedded: Tensor, ratio: Tensor | None = None) -> Tensor:
        """(B, g, width) for ``embedded`` (B, T0, width), words being scaled ``ratio`` (B, 1, 1) times."""
        rows: Tensor = embeddings.global_embeddings(embedded)
        if ratio is not None:
            position: Tensor | float = 0.0
            if self.positions is not None:
                ids = torch.tensor(self.position_rows, device=rows.device)
                position = getattr(embeddings, self.positions)(ids)
            rows = (position + ratio * (rows - position)).to(rows.dtype)
        for name in self.path:
            module = getattr(embeddings, name)
            # by forward: the hooks of others see the tokens alone
            rows = rows if module is None else module.forward(rows)
        return rows

    def prepend(self, base: nn.Module, embedded: Tensor) -> Tensor:
        """(B, g + T0, width) of ``embedded`` (B, T0, width).

        They are those noted on the tensor, or, if a caller replaced it or calls the stack alone, those
        of any input.
        """
        rows, differentiable, is_used = getattr(embedded, NOTE, (None, None, False))
        if is_used and torch._C._current_graph_task_id() == -1:
            rows = None  # old: the same tensor again, and not a checkpoint that runs again in a backward
        if rows is not None and not is_compiling():
            delattr(embedded, NOTE)
            if differentiable:
                setattr(embedded, NOTE, (rows, differentiable, True))
        ratio = None
        if not is_compiling():
            ratio = _RATIO.get()
            _RATIO.set(None)
        if rows is None or differentiable != torch.is_grad_enabled():
            embeddings: Any = base.get_submodule(self.embeddings)
            fits = ratio is not None and len(ratio) == len(embedded)
            rows = self.of(embeddings.lsg_self.module, embedded, ratio if fits else None)
            if self.projection is not None:
                rows = getattr(base, self.projection)(rows)
        return torch.cat([rows.to(embedded), embedded], dim=1)


@dataclass(frozen=True)
class NoteGlobals:
    """After the embeddings: their global tokens are noted on what they give, for the stack.

    Here the ids are known, which words may be scaled by, and the weights are there (FSDP gathers
    those of a module for its forward).
    """

    tokens: GlobalTokens
    call: Signature
    word_scale: Callable[[Any, Tensor | None, Tensor | None], Tensor | float]

    def __call__(self, embeddings: nn.Module, args: Args, kwargs: Kwargs, output: Tensor) -> Tensor:
        ids, mask = (self.call.get(x, args, kwargs) for x in ("input_ids", self.call.mask))
        scale = self.word_scale(embeddings, ids, mask)
        ratio = None
        if isinstance(scale, Tensor):
            ratio = scale / self.word_scale(embeddings, None, None)
        elif is_compiling():
            return output  # not every compiler knows attributes of tensors
        if not is_compiling():
            _RATIO.set(ratio)
        rows = self.tokens.of(embeddings, output, ratio)
        if rows.requires_grad and not is_compiling():
            rows, output = _Together.apply(rows, output)
        setattr(output, NOTE, (rows, torch.is_grad_enabled(), False))
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
    rows, differentiable, _ = getattr(args[0], NOTE, (None, None, False))
    if rows is not None:
        if not differentiable and not is_compiling():
            delattr(args[0], NOTE)
        setattr(output, NOTE, (projection.forward(rows), differentiable, False))


@dataclass(frozen=True)
class CompactMask:
    """Before embeddings that read the padding mask: (B, T), as they do unpatched."""

    call: Signature

    def __call__(self, embeddings: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        mask = compat.padding_mask(self.call.get(self.call.mask, args, kwargs))
        return (
            (args, kwargs) if mask is None else self.call.put({self.call.mask: mask}, args, kwargs)
        )


@dataclass(frozen=True)
class EnterStack:
    """Before the layer stack: global tokens come in, hidden states and the mask are laid out.

    With ``rotary`` positions their rotation is as well, which the base model hands to the stack, or
    which is made here. ``relative_bias`` gives the table of a ``RelativeBias``, of the stack;
    ``of_globals`` are the positions of the global tokens. ``from_text``: positions count from where the
    text begins, so that those of global tokens are in a table whatever padding is on the left.
    """

    config: LSGConfig
    call: Signature
    tokens: GlobalTokens | None
    rotary: Rotary | None
    relative_bias: Callable[[Any], Tensor] | None
    of_globals: tuple[int, ...]
    is_causal: bool
    from_text: bool

    def __call__(self, stack: Any, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        call, first = self.call, self.call.names[0]
        hidden, mask = (call.get(name, args, kwargs) for name in (first, call.mask))
        carried = call.get("head_mask", args, kwargs) if self.is_causal else None
        if self.is_causal and mask is None and carried is None:
            raise ValueError(
                "the layer stack of a patched decoder got no mask, which its model makes: call the "
                "whole model, or unpatch it"
            )
        mask, length = compat.padding_mask(mask, carried), hidden.shape[1]
        seen = length if mask is None else mask.shape[1]
        if seen != length and not self.is_causal:
            raise ValueError(
                f"the layer stack got {length} hidden states and a mask of {seen} tokens: "
                "they must be as many"
            )
        if self.tokens is not None:
            hidden = self.tokens.prepend(stack.lsg_base.module, hidden)

        def positions() -> Tensor:
            """Those of the global tokens, and of the last ``length`` of the tokens that are seen."""
            tokens = torch.arange(seen, device=hidden.device)[None]
            of_all = with_globals_in_front(tokens, mask, self.of_globals)
            if self.from_text and mask is not None and self.of_globals:
                of_all = (of_all - of_all[:, :1]).clamp(min=0)
            if seen == length:
                return of_all
            return torch.cat([of_all[:, : len(self.of_globals)], of_all[:, -length:]], dim=1)

        rotation = bias = None
        if self.rotary is not None:
            given = call.get(compat.ROTATION, args, kwargs)
            if given is not None:  # every angle is there twice, for both elements of a pair
                cos, sin = (part[..., : part.shape[-1] // 2] for part in given)
                rotation = cos, sin
            else:
                rotation = self.rotary.rotation(stack, positions())
        if self.relative_bias is not None:
            bias = RelativeBias(self.relative_bias(stack), positions())
        if seen == length:
            hidden, layout = enter(hidden, mask, self.config, rotation, bias)
        else:
            layout = lay_out_step(mask, length, self.config, hidden.device)
            layout = layout._replace(rotation=rotation)
        changed = {first: hidden, call.mask: layout}
        if carried is not None:
            changed["head_mask"] = None  # cross attention has no use for it
        return call.put(changed, args, kwargs)


def leave_out(*args: Any, **kwargs: Any) -> None:
    """In place of a method of the stack that would make (T, T) tensors for its layers."""


# on the output of the stack: its rows that tokens are given back from, (1 or B, T0)
ROWS = "lsg_rows"


@dataclass(frozen=True)
class LeaveStack:
    """After the layer stack: its output, and what it collected, in the input's order.

    ``for_model``: the base model has collected something, too, and finds the order on the output.
    """

    call: Signature
    for_model: bool

    def __call__(self, stack: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        layout: Layout = self.call.get(self.call.mask, args, kwargs)
        output = in_order(output, layout.rows)
        if self.for_model and not is_compiling():
            setattr(output if isinstance(output, Tensor) else output[0], ROWS, layout.rows)
        return output


@dataclass(frozen=True)
class LeaveModel:
    """After the base model: what its own hooks recorded inside the stack, in the input's order."""

    config: LSGConfig
    call: Signature
    num_layers: int

    def __call__(self, base: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        if isinstance(output, Tensor):
            return output
        values = output if isinstance(output, tuple) else tuple(output.values())
        last: Tensor = values[0]
        # what took the place of the forward may give something else than a tensor first
        rows = None if is_compiling() else getattr(last, "__dict__", {}).pop(ROWS, None)
        recorded = [x for value in values if _are_recorded(value) for x in value if x is not None]
        if recorded:
            if rows is None:
                mask = compat.padding_mask(self.call.get(self.call.mask, args, kwargs))
                rows = self._rows(mask, last, recorded[0])
            output = in_order(output, rows, last)
        if not isinstance(output, tuple) and wants_attentions(self.call, base, args, kwargs):
            output["attentions"] = (None,) * self.num_layers
        return output

    def _rows(self, mask: Tensor | None, last: Tensor, state: Tensor) -> Tensor:
        """Those of a stack that was compiled, or of which a hook of others replaced the output."""
        packing = packing_of(mask, self.config)
        # a stack that is compiled by itself is not packed: its states tell
        if packing is not None and state.shape[:2] == (1, len(packing.taken)):
            return packing.layout.rows
        return lay_out_step(mask, last.shape[1], self.config, last.device).rows


def wants_attentions(call: Signature, owner: nn.Module, args: Args, kwargs: Kwargs) -> bool:
    """Whether they were asked for, in the call or else in the model's config."""
    asked = call.get("output_attentions", args, kwargs)
    return bool(getattr(owner.config, "output_attentions", False) if asked is None else asked)


def in_order(output: Any, rows: Tensor, last: Tensor | None = None) -> Any:
    """A model's output, a tuple or a lone tensor, with its rows of the stack in the input's order.

    These are hidden states (B, N, width), a lone one or several, and maps (B, H, N, S) over the states
    of an encoder, the only ones that there are. Of a base model, which replaces the last one recorded
    by its own ``last``, lone ones are in order already.
    """

    def change(states: Tensor) -> Tensor:
        return states if states is last else take_rows(states, rows)

    def changed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value) if last is None else value
        if not _are_recorded(value):
            return value
        return tuple(
            x if x is None else change(x) if x.dim() == 3 else change_heads(x, change)
            for x in value
        )

    if isinstance(output, Tensor):
        return changed(output)
    if isinstance(output, tuple):
        return tuple(map(changed, output))
    return type(output)(**{name: changed(value) for name, value in output.items()})


def _are_recorded(value: Any) -> bool:
    # None: a hidden state that was not requested (5.23 takes a list of layers)
    return (
        isinstance(value, (tuple, list))
        and any(x is not None for x in value)
        and all(x is None or (isinstance(x, Tensor) and x.dim() in (3, 4)) for x in value)
    )
