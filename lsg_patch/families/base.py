"""What is to be known of a model family to patch it: where things are, and what they are called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def no_offset(positions: nn.Module) -> int:
    """Position 0 is the table's first row."""
    return 0


def after_padding_row(positions: nn.Module) -> int:
    """Positions begin after the row of the padding index (RoBERTa: row 2)."""
    padding_idx = positions.padding_idx
    return 0 if padding_idx is None else int(padding_idx) + 1  # type: ignore[arg-type]


def nothing_more(embeddings: Any, config: Any) -> Tensor | None:
    """A word, its position and its token type make a token's embedding."""
    return None


def unscaled(embeddings: Any, ids: Tensor | None, mask: Tensor | None) -> Tensor | float:
    """Words are taken as their table has them."""
    return 1.0


def learned(rows: Tensor, offset: int, length: int, config: Any) -> Tensor | None:
    """No formula gives the position table."""
    return None


def continued(rows: Tensor, computed: Tensor) -> Tensor:
    """The ``rows`` (m, width) that there are, and after them those of ``computed`` (n, width).

    What there is stays as it is, so that short inputs and the way back are exact.
    """
    return torch.cat([rows, computed[len(rows) :].to(rows)])[: len(computed)].clone()


def context_alone(module: Any, hidden: Tensor, context: Tensor) -> Tensor:
    """The module gives the joined heads; what follows them is outside of it."""
    return context


@dataclass(frozen=True)
class Projection:
    """The module projects the joined heads by its own layer ``name``."""

    name: str

    def __call__(self, module: Any, hidden: Tensor, context: Tensor) -> Tensor:
        return getattr(module, self.name)(context)  # type: ignore[no-any-return]


def always(config: Any) -> bool:
    """Whatever the config says."""
    return True


def never(attention: Any) -> bool:
    """Whatever module it is."""
    return False


@dataclass(frozen=True)
class Rotary:
    """Positions that turn queries and keys, in place of rows that are added to the words.

    Nothing of this is limited in length, and how much two tokens see of each other depends on how
    far apart they are alone. Global tokens have positions as well: see ``global_positions``.

    Attributes:
        rotation: cosines and sines, each (..., head size / 2), of positions (...):
            ``rotation(stack, positions)``.
        interleaved: whether neighbours in a head are turned as a pair; else an element and the one
            half a head after it.
        is_used: whether a model with this config has rotary positions.
        turns_values: whether a self-attention module turns its values as well.
        table: a table of sines and cosines that ``rotation`` reads, below the base model; it grows
            as a table of positions does.
    """

    rotation: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    interleaved: bool = False
    is_used: Callable[[Any], bool] = always
    turns_values: Callable[[Any], bool] = never
    table: str | None = None


@dataclass(frozen=True)
class AttentionNames:
    """Attributes of a self-attention module: three projections, the heads, the dropout."""

    query: str = "query"
    key: str = "key"
    value: str = "value"
    heads: str = "num_attention_heads"
    dropout: str = "dropout"


@dataclass(frozen=True)
class Family:
    """A model family as data. Paths are those of modules below the base model.

    Attributes:
        name: as in the error messages and tables.
        base_classes: class names of the base models (also of what they are derived from).
        attentions: the self-attention modules, ``*`` for the index of a layer. They return a tuple,
            their output first.
        stack: the module that runs the layers; what goes in and out of it is changed there. Its mask
            is 1 or True for tokens, or, of four dimensions, what is added to scores.
        embeddings: it embeds the tokens, and it holds the global ones, so that they are in the
            state dict where the reference has them. Where the stack embeds its input itself (BART's
            encoder), it is the ``stack``.
        global_path: modules below ``embeddings`` that a global token passes, as a word does; one
            that is None in a model is left out.
        projection: a module of the base model that embedded tokens pass after that, where it has it.
        words, positions, token_types: the embedding tables below ``embeddings``; None where there
            are no such rows to add. Models with rotary positions may lack the ``positions``.
        rotary: how positions turn queries and keys, in families that have such.
        word_scale: what the words of each row are multiplied with before their positions are added,
            (B, 1, 1): ``word_scale(embeddings, ids, mask)`` of ids (B, T) and, where the embeddings
            get it, the padding mask; of None and None: what they are usually multiplied with.
        first_token_extra: what the embedding of an input's first token has besides its word, position
            and token type, (width,), or None: ``first_token_extra(embeddings, config)``.
        position_offset: rows of the position table before that of position 0.
        config_counts_offset: whether ``config.max_position_embeddings`` counts these rows too.
        computed_positions: the position table of another length, (offset + length, width), where a
            formula gives it, else None: ``computed_positions(rows, offset, length, config)`` of the
            old ``rows`` (offset + n, width), with which it begins.
        position_buffers: buffers of ``embeddings`` as long as the position table, (n,) or (1, n):
            ``position_ids`` count up from their first, others are 0.
        decoder: the module that reads what the encoder gives; its attention is not patched.
        decoder_positions: its position table, below the base model. It grows as well: heads for
            classification and questions read the whole input by the decoder too, and a saved
            model's config states one length for both tables.
        begins_with_cls: whether inputs begin with the cls/bos token, which the first global token
            can then replace.
        names: the attributes of a self-attention module.
        output: what a self-attention module makes of its input (B, N, width) and of the joined
            heads (B, N, heads * head size): ``output(module, hidden, context)``.
        relative_bias: where scores depend on the distance of key and query: the bias of each
            distance, (H, 2 * m + 1) as in ``RelativeBias``: ``relative_bias(stack)``, read in each
            forward. Not where the stack embeds its input itself.
        methods_left_out: methods of ``stack`` that a patched one must not run, since they make
            (T, T) tensors for its layers; they give None instead.
    """

    name: str
    base_classes: tuple[str, ...]
    attentions: str = "encoder.layer.*.attention.self"
    stack: str = "encoder"
    embeddings: str = "embeddings"
    global_path: tuple[str, ...] = ("LayerNorm", "dropout")
    projection: str | None = None
    words: str = "word_embeddings"
    positions: str | None = "position_embeddings"
    token_types: str | None = "token_type_embeddings"
    rotary: Rotary | None = None
    word_scale: Callable[[Any, Tensor | None, Tensor | None], Tensor | float] = unscaled
    first_token_extra: Callable[[Any, Any], Tensor | None] = nothing_more
    position_offset: Callable[[nn.Module], int] = no_offset
    config_counts_offset: bool = True
    computed_positions: Callable[[Tensor, int, int, Any], Tensor | None] = learned
    position_buffers: tuple[str, ...] = ("position_ids", "token_type_ids")
    begins_with_cls: bool = True
    names: AttentionNames = AttentionNames()
    output: Callable[[Any, Tensor, Tensor], Tensor] = context_alone
    relative_bias: Callable[[Any], Tensor] | None = None
    methods_left_out: tuple[str, ...] = ()
    decoder: str | None = None
    decoder_positions: str | None = None

    @property
    def embeds_in_stack(self) -> bool:
        """Whether the module that runs the layers also makes the embeddings of its input."""
        return self.embeddings == self.stack


def find_modules(root: nn.Module, path: str) -> list[nn.Module]:
    """The modules below ``root`` at ``path``, in order; ``*`` matches every child.

    Raises:
        AttributeError: there is none of that name.
    """
    found = [root]
    for part in path.split("."):
        if part == "*":
            found = [child for module in found for child in module.children()]
        else:
            found = [module.get_submodule(part) for module in found]
    return found
