"""Every difference between versions of transformers, found where it can be by looking at what is there."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def own_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that ``cls`` has the forward of transformers from, below those of users.

    Of a class that owes nothing to transformers it is the one that defines its forward.
    """
    definers = [parent for parent in cls.__mro__ if "forward" in vars(parent)]
    of_transformers = (x for x in definers if x.__module__.startswith("transformers"))
    return next(of_transformers, definers[0])


def is_overridden(cls: type[nn.Module]) -> bool:
    """Whether a user's class overrides the forward of transformers."""
    return own_class(cls).forward is not cls.forward


def forward_parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of the forward that transformers has for a module, without ``self``.

    They were renamed and moved again and again (4.54, 4.56, 5.0, 5.4), so they are looked up.
    """
    return _parameters(own_class(type(module)).forward)


@functools.lru_cache(maxsize=256)
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


# a padding mask's name: most families; DistilBERT's stack, and its attention, before 5.0
MASK_NAMES = ("attention_mask", "attn_mask", "mask")
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


@dataclass(frozen=True)
class Signature:
    """The parameters of a forward, which versions call by position or by name, and that of its mask.

    They are looked up once, when a model is patched: compiled code cannot ask a function for them.
    """

    names: tuple[str, ...]
    mask: str

    @classmethod
    def of(cls, module: nn.Module) -> Signature:
        names = forward_parameters(module)
        return cls(names, next((name for name in MASK_NAMES if name in names), MASK_NAMES[0]))

    def get(self, name: str, args: Args, kwargs: Kwargs) -> Any:
        """An argument of a call; None where it is not given."""
        at = self._place(name, args)
        return kwargs.get(name) if at is None else args[at]

    def put(self, values: Kwargs, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """The call with these arguments."""
        for name, value in values.items():
            at = self._place(name, args)
            if at is None:
                kwargs = {**kwargs, name: value}
            else:
                args = args[:at] + (value,) + args[at + 1 :]
        return args, kwargs

    def _place(self, name: str, args: Args) -> int | None:
        for at, own in enumerate(self.names[: len(args)]):  # torch 2.1 compiles no index()
            if own == name:
                return at
        return None


def _imported_beside(base: nn.Module, function: str) -> Callable[..., Any] | None:
    """The function of that name that the file which defines a model's forward has, if it does."""
    return getattr(sys.modules[own_class(type(base)).__module__], function, None)


@dataclass(frozen=True)
class MaskCarrier:
    """How the padding mask (B, T) comes through a model, or an encoder, to the layers without growing.

    Of two dimensions, and decoders also of none, models make (B, 1, T, T): 5.0 and later always, but
    they hand on what has four dimensions; 4.41 to 4.57 for fused attention, in one family after
    the other, unless there is a head mask. What says whether that attention is fused is kept in
    three places (the model, a private attribute, the config, which models share), so a head mask is
    given in any case. It carries the padding mask, for where the other one is dropped (BERT generation
    with a cache, up to 4.52) or would be expanded all the same (BART's kind of encoder before 5.0).

    Attributes:
        dims: of the mask that is handed over; 0: none is.
        parts: of the head mask, one for each layer; 0: none is handed over.
    """

    dims: int
    parts: int

    @classmethod
    def of(cls, base: nn.Module, layers: int, is_causal: bool) -> MaskCarrier:
        if is_causal:  # before 5.0, (B, 1, 1, T) is made of three
            dims = 4 if _imported_beside(base, "create_causal_mask") else 3
            return cls(dims, layers if "head_mask" in forward_parameters(base) else 0)
        expands = _imported_beside(base, "_prepare_4d_attention_mask_for_sdpa") is not None
        dims = 4 if _imported_beside(base, "create_bidirectional_mask") else 2
        return cls(dims, layers if expands else 0)

    @classmethod
    def of_encoder(cls, encoder: nn.Module, layers: int) -> MaskCarrier:
        """Of one that embeds its input, BART's, which hands its part of the head mask to each layer."""
        return cls(0, layers) if "head_mask" in forward_parameters(encoder) else cls(4, 0)

    def pack(self, call: Signature, mask: Tensor | None, device: torch.device) -> Kwargs:
        """The arguments that ``mask`` (B, T) travels as."""
        given: Kwargs = {call.mask: mask if self.dims == 2 else None}
        if mask is not None and self.dims > 2:
            # by indexing: a size of the mask would be fixed where it is exported or traced
            between = [None] * (self.dims - 2)
            given[call.mask] = mask.to(torch.bool)[(slice(None), *between)]
        if self.parts:
            carried = torch.ones(1, 1, device=device) if mask is None else mask
            expanded = carried[None, :, None, None, :].expand(self.parts, -1, -1, -1, -1)
            given["head_mask"] = expanded
        return given


def padding_mask(mask: Tensor | None, head_mask: Tensor | None = None) -> Tensor | None:
    """(B, T), True for tokens, of the masks that a model hands on, or as a ``MaskCarrier`` has them.

    ``mask`` is (B, T), 1 for tokens, or (B, 1, T), or (B, 1, 1 or T, T), boolean or to be added to
    scores; a ``head_mask`` that carries it, (layers, B, 1, 1, T), says it in place of that.
    """
    if head_mask is not None:
        return head_mask[0, :, 0, 0].to(torch.bool)
    if mask is None or mask.dim() == 2:
        return mask if mask is None else mask.to(torch.bool)
    if mask.dim() == 3:
        return mask[:, 0].to(torch.bool)
    mask = mask[:, 0, -1]
    return mask > -1 if mask.is_floating_point() else mask.to(torch.bool)


def stack_collects_hidden_states(stack: nn.Module) -> bool:
    """Whether the stack returns its hidden states (4.x), or hooks of the base model do (5.x)."""
    return "output_hidden_states" in forward_parameters(stack)


# what a base model hands to its stack, where it makes the rotation of all rows itself (ESM: 5.6)
ROTATION = "position_embeddings"


def hands_rotation_to_stack(stack: nn.Module) -> bool:
    """Whether the base model turns positions into cosines and sines, or each layer does."""
    return ROTATION in forward_parameters(stack)


# what else a stack takes that is not one value a row or a token, or is a decoder's alone
_OF_ALL_ROWS = (
    "head_mask",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "past_key_values",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
)


def arguments_by_row(stack: nn.Module) -> tuple[str, ...]:
    """What a stack hands to its layers besides hidden states, mask and rotation (XMOD: languages)."""
    known = (*MASK_NAMES, ROTATION, *_OF_ALL_ROWS)
    return tuple(name for name in forward_parameters(stack)[1:] if name not in known)


def attention_outputs(attention: nn.Module) -> int:
    """How many values a self-attention module must return: the states, the maps, perhaps a cache.

    Two are right everywhere but in BART's kind (known by its states of another sequence) before 4.54,
    whose layers take three and no other number. Nothing of the module itself tells 4.53 from 4.54.
    """
    import transformers

    is_barts = "key_value_states" in forward_parameters(attention)
    release = tuple(int(number) for number in transformers.__version__.split(".")[:2])
    return 3 if is_barts and release < (4, 54) else 2


def can_decode(base: nn.Module, stack: nn.Module) -> bool:
    """Whether a model that is told to be a decoder is one: it hands a cache on to its layers."""
    return all("past_key_values" in forward_parameters(module) for module in (base, stack))


def cached_length(cache: Any) -> int:
    """How many tokens a cache holds: an object, or (up to 4.53) a tuple for each layer."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return int(cache[0][0].shape[2])


@dataclass(frozen=True)
class KeyCache:
    """How a decoder's self-attention module is given earlier keys and values, and keeps its own.

    4.54 and later hand on one object for all layers, which are told their index, and it is changed
    in place; it may hold another one for cross attention. Before, each layer gets a tuple and
    returns a longer one, also where nobody asked for it.
    """

    call: Signature
    argument: str
    is_tuple: bool

    @classmethod
    def of(cls, attention: nn.Module) -> KeyCache:
        call = Signature.of(attention)
        old = "past_key_value" in call.names
        name = "past_key_value" if old else "past_key_values"
        return cls(call, name, not hasattr(attention, "layer_idx"))

    def given(self, args: Args, kwargs: Kwargs) -> Any:
        return self.call.get(self.argument, args, kwargs)

    def extend(
        self, attention: Any, key: Tensor, value: Tensor, args: Args, kwargs: Kwargs
    ) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        """All keys and values (B, H, P + T, D), and what the module is to return besides."""
        cache = self.given(args, kwargs)
        if self.is_tuple:
            if cache is not None:
                key, value = (
                    torch.cat([old, new], dim=2)
                    for old, new in zip(cache, (key, value), strict=True)
                )
            return key, value, ((key, value),)
        if cache is not None:
            own = getattr(cache, "self_attention_cache", cache)
            at = self.call.get("cache_position", args, kwargs)  # up to 5.3
            more = () if at is None else ({"cache_position": at},)
            key, value = own.update(key, value, attention.layer_idx, *more)
        return key, value, ()


@dataclass(frozen=True)
class CrossMask:
    """The mask of a decoder over the states of an encoder, for one query in place of each.

    5.0 and later make it as long as the embeddings (``create_bidirectional_mask``, or None), which
    is not as long as the stack's input; what has four dimensions they hand on as it is. Before,
    it is made for all queries at once.
    """

    make: Callable[..., Any] | None
    embeddings: str

    @classmethod
    def of(cls, base: nn.Module) -> CrossMask:
        make = _imported_beside(base, "create_bidirectional_mask")
        # 5.0 and 5.1 have another name
        names = inspect.signature(make).parameters if make else {}
        return cls(make, "input_embeds" if "input_embeds" in names else "inputs_embeds")

    def of_one_query(self, config: Any, mask: Tensor | None, states: Tensor) -> Any:
        """Of ``mask`` (B, S) over ``states`` (B, S, width), what the model is to be given."""
        if self.make is None or mask is None or mask.dim() != 2:
            return mask
        embeddings = {self.embeddings: states[:, :1]}
        return self.make(
            config=config, attention_mask=mask, encoder_hidden_states=states, **embeddings
        )


def scale_of_looked_up_words(embeddings: Any) -> float:
    """What the owner of the words multiplies with after looking them up."""
    return float(getattr(embeddings, "embed_scale", 1.0))


def takes_shape(positions: nn.Module) -> bool:
    """Whether BART's kind of position table takes the shape of ids, or (4.22) ids of that shape."""
    return "input_ids_shape" in forward_parameters(positions)


def one_position(given: Any) -> Any:
    """What such a table is to be given in place of that, for the first token alone."""
    return torch.Size((given[0], 1)) if isinstance(given, tuple) else given[:, :1]


def has_relative_positions(config: Any) -> bool:
    """Whether the attention's scores have terms for distances (4.x: relative_key, relative_key_query)."""
    # 4.54 and 4.55 have a property of this name where it has no effect, which warns when it is read
    return str(vars(config).get("position_embedding_type")).startswith("relative")


def hub_file(repository: str, name: str, **where: Any) -> str | None:
    """A file of a repository of the hub, from its cache or fetched; None: it is not to be had."""
    utils: Any = importlib.import_module("transformers.utils")
    try:
        if hasattr(utils, "cached_file"):
            found: str | None = utils.cached_file(repository, name, **where)
            return found
        # before 4.22
        place = {key: where.pop(key) for key in ("revision", "subfolder") if key in where}
        return str(utils.cached_path(utils.hf_bucket_url(repository, name, **place), **where))
    except (OSError, ValueError):  # the latter of a name that no repository can have
        return None


def reads_safetensors() -> bool:
    """Whether ``from_pretrained`` reads such files, and takes them before others (4.22 and later)."""
    return hasattr(importlib.import_module("transformers.utils"), "SAFE_WEIGHTS_NAME")


@contextmanager
def expecting(cls: Any, pattern: str) -> Iterator[None]:
    """``cls.from_pretrained`` says nothing of weights without a place whose names match ``pattern``."""
    name = "_keys_to_ignore_on_load_unexpected"
    own = {name: vars(cls)[name]} if name in vars(cls) else {}
    setattr(cls, name, [*(getattr(cls, name) or ()), pattern])
    try:
        yield
    finally:
        delattr(cls, name)
        for value in own.values():
            setattr(cls, name, value)
