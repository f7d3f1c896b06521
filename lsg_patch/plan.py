"""Everything that a patch will change, found and checked before anything is changed."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from lsg_patch import compat
from lsg_patch.config import LSGConfig
from lsg_patch.families import Family, Rotary, find_modules
from lsg_patch.modules.global_embeddings import global_positions, initial_rows
from lsg_patch.tokenizer import find_token_ids

logger = logging.getLogger(__name__)

# of a module: the rows that it takes at a time, of which its input must have a multiple
CHUNK = "chunk_size_feed_forward"


@dataclass
class Plan:
    """The places in a model, and the first global tokens.

    ``first_token_rest`` (width,) is what an input's first token has besides its word and position;
    ``num_layers`` counts the layers that run, which may share one of ``attentions``; ``offset`` is
    the number of rows before that of position 0 in the table ``positions`` (None: there is no
    table), of which ``max_position_embeddings`` of the model's ``configs`` counts ``config_offset``;
    ``rotary`` is None where the table's rows are added to words; ``global_positions`` are those of
    the global tokens, spread over ``global_reach`` rows of a table; ``global_rows``
    (num_global_tokens, width), or None for none, the first of which is made of the token ``bos_id``;
    ``chunked`` are the modules that have a ``CHUNK``; ``layers`` are those of ``Family.layers``,
    ``row_wise`` those of ``Family.row_wise``; ``is_causal`` says that the model is a decoder;
    ``can_unpad`` that its layers can run on packed rows.
    """

    attentions: list[nn.Module]
    layers: list[nn.Module]
    row_wise: list[nn.Module]
    stack: nn.Module
    embeddings: nn.Module
    words: nn.Embedding
    positions: nn.Embedding | None
    rotary: Rotary | None
    global_positions: tuple[int, ...]
    global_reach: int | None
    first_token_rest: Tensor | None
    offset: int
    config_offset: int
    configs: dict[str, Any]
    num_layers: int
    chunked: list[nn.Module]
    decoder: nn.Module | None = None
    decoder_positions: nn.Embedding | None = None
    global_rows: Tensor | None = None
    bos_id: int | None = None
    is_causal: bool = False
    can_unpad: bool = True


@dataclass
class SavedGlobals:
    """Global tokens that were saved: ``rows`` (n, width) of which the first ones are taken.

    ``reach`` and ``bos_id`` are ``global_reach`` and ``bos_id`` of a ``Plan``, where they are known.
    """

    rows: Tensor | None
    reach: int | None = None
    bos_id: int | None = None


def make_plan(
    model: nn.Module,
    base: nn.Module,
    family: Family,
    config: LSGConfig,
    tokenizer: Any,
    saved: SavedGlobals | None = None,
) -> Plan:
    """Find what is to be changed in ``base``, which is ``model`` or inside of it.

    Global tokens are those that were ``saved``, and new ones.

    Raises:
        ValueError: the model is of a kind that cannot be patched, or a token id is not to be found.
        TypeError: it is not built as its family is.
    """
    _check_kind(base)
    try:
        plan = _locate(model, base, family, config, saved.reach if saved else None)
    except AttributeError as error:
        raise TypeError(
            f"{type(base).__name__} is not built like a {family.name} model: {error}"
        ) from error
    if not plan.attentions:
        raise ValueError(f"{type(base).__name__} has no layers: there is nothing to patch")
    if getattr(base.config, "is_decoder", False):
        _check_decoder(base, family, plan)
        plan.is_causal = True
    hindrance = _unpad_hindrance(base, family, plan)
    plan.can_unpad = hindrance is None
    if config.unpad and hindrance:
        raise ValueError(f"unpad=True: {type(base).__name__} {hindrance}; pass unpad=False")
    _check_forwards((base, plan.embeddings, plan.stack, *plan.attentions))
    _check_positions(plan, config)
    _warn_of_unseen_tokens(plan, family, config)
    if plan.chunked:
        logger.warning(
            "%s=%d is 0 while the model is patched: with global tokens, lengths are no multiples of it",
            CHUNK,
            getattr(plan.chunked[0], CHUNK),
        )
    if config.num_global_tokens:
        plan.global_rows = _global_rows(base, family, plan, config, tokenizer, saved)
    return plan


def _check_kind(base: nn.Module) -> None:
    model_config: Any = base.config
    if compat.has_relative_positions(model_config):
        raise ValueError(
            f"position_embedding_type={model_config.position_embedding_type!r}: relative positions "
            "are part of the attention itself and cannot be patched; use a model with absolute ones"
        )


def _check_decoder(base: nn.Module, family: Family, plan: Plan) -> None:
    if not compat.can_decode(base, plan.stack):
        raise ValueError(
            f"config.is_decoder=True, but {type(base).__name__} is an encoder and no decoder: its "
            "layers keep no keys (past_key_values); set config.is_decoder=False before it is made"
        )
    if family.relative_bias is not None or family.methods_left_out:
        raise ValueError(
            f"config.is_decoder=True, but decoders of the family {family.name} are not supported, which "
            "has a relative_bias or methods_left_out: set config.is_decoder=False before it is made"
        )


def _unpad_hindrance(base: nn.Module, family: Family, plan: Plan) -> str | None:
    """What keeps a model's layers from running on packed rows, in words."""
    if plan.is_causal:
        return "is a decoder, whose cache holds the rows of a batch side by side"
    if family.embeds_in_stack:
        return "has no place between its embeddings and its layers to pack them at"
    by_row = compat.arguments_by_row(plan.stack)
    if by_row:
        return f"hands {', '.join(by_row)} to its layers, of which each row has its own"
    return None


def _locate(
    model: nn.Module, base: nn.Module, family: Family, config: LSGConfig, saved_reach: int | None
) -> Plan:
    embeddings = base.get_submodule(family.embeddings)

    def table(name: str) -> nn.Embedding:
        return _table(base, f"{family.embeddings}.{name}")

    for name in family.global_path:
        getattr(embeddings, name)
    attentions = find_modules(base, family.attentions)
    names = family.names
    for module in attentions:
        for name in (names.query, names.key, names.value):
            module.get_submodule(name)
        for name in (names.heads, names.dropout):
            getattr(module, name)
    stack = base.get_submodule(family.stack)
    for name in family.methods_left_out:
        getattr(stack, name)
    rotary = family.rotary
    if rotary is not None and not rotary.is_used(base.config):
        rotary = None
    positions = _positions(base, family, rotary)
    offset = 0 if positions is None else family.position_offset(positions)
    reach, table_reach = config.max_position_embeddings, None
    if rotary is None and family.relative_bias is None and positions is not None:
        reach = table_reach = positions.num_embeddings - offset
        if saved_reach is not None:
            if saved_reach > reach:
                raise ValueError(
                    f"the saved global tokens are spread over {saved_reach} positions (global_reach), "
                    f"but the model has {reach}: it is another model's config, save the model again"
                )
            reach = table_reach = saved_reach
    # on a CPU whatever device new tensors are made on at the moment: they become numbers
    stride, device = config.global_positional_stride, torch.device("cpu")
    taken = global_positions(reach, stride, config.num_global_tokens, device)
    token_type = table(family.token_types).weight[0] if family.token_types else None
    with torch.no_grad():
        rest = (token_type, family.first_token_extra(embeddings, base.config))
        known = [row.detach() for row in rest if row is not None]
    layers = find_modules(base, family.layers) if family.layers else []
    return Plan(
        attentions=attentions,
        layers=layers,
        row_wise=[
            module
            for layer in layers
            for path, module in layer.named_modules()
            if path in family.row_wise
        ],
        stack=stack,
        embeddings=embeddings,
        words=table(family.words),
        positions=positions,
        rotary=rotary,
        global_positions=tuple(taken.tolist()),
        global_reach=table_reach,
        first_token_rest=torch.stack(known).sum(0) if known else None,
        offset=offset,
        config_offset=offset if family.config_counts_offset else 0,
        configs=configs_around(model, base),
        num_layers=getattr(base.config, "num_hidden_layers", len(attentions)),
        chunked=[module for module in stack.modules() if getattr(module, CHUNK, 0)],
        decoder=base.get_submodule(family.decoder) if family.decoder else None,
        decoder_positions=_table(base, family.decoder_positions)
        if family.decoder_positions
        else None,
    )


def _positions(base: nn.Module, family: Family, rotary: Rotary | None) -> nn.Embedding | None:
    """The table of positions, or of their sines."""
    if rotary is not None and rotary.table is not None:
        return _table(base, rotary.table)
    if family.positions is None:
        return None
    path = f"{family.embeddings}.{family.positions}"
    try:
        return _table(base, path)
    except AttributeError:
        if rotary is None:
            raise
        return None  # with rotary positions there may be an idle table (ESM before 4.53)


def _table(base: nn.Module, path: str) -> nn.Embedding:
    found = base.get_submodule(path)
    if not isinstance(found, nn.Embedding):
        raise AttributeError(f"{path} is a {type(found).__name__}, not an Embedding")
    return found


def _check_forwards(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        own = vars(module).get("forward")
        if own is not None and not compat.is_left_behind(module, own):
            raise ValueError(
                f"the forward of a {type(module).__name__} was replaced by {own!r}, which would hide "
                "the patch: patch the model first, or take the replacement away"
            )


def configs_around(model: nn.Module, base: nn.Module) -> dict[str, Any]:
    """The configs that state the length of ``base``, by their paths: its own, and those of the
    modules around it in ``model`` that are of its kind. Mostly they are one and the same object.
    """
    path = next(name for name, module in model.named_modules() if module is base)
    found: dict[str, Any] = {}
    for name in ("", *accumulate(path.split("."), "{}.{}".format)):
        config = getattr(model.get_submodule(name), "config", None)
        known = any(config is other for other in found.values())
        if type(config) is type(base.config) and not known:
            found[f"model.{name}.config" if name else "model.config"] = config
    return found


def _check_positions(plan: Plan, config: LSGConfig) -> None:
    if plan.positions is None:
        return  # no table, no end
    rows = plan.positions.num_embeddings - plan.offset + plan.config_offset
    target = config.max_position_embeddings + plan.config_offset
    for name, model_config in plan.configs.items():
        stated = model_config.max_position_embeddings
        if stated != rows:
            raise ValueError(
                f"{name}.max_position_embeddings is {stated}, but the model has a table of {rows}. If "
                "another patched model shares this config object, unpatch that one, give this one its "
                "own (model = copy.deepcopy(model)) and patch them anew; else set the number to the "
                "table's"
            )
    if target < rows:
        logger.warning(
            "max_position_embeddings=%d shortens the model's %d positions",
            config.max_position_embeddings,
            rows - plan.config_offset,
        )


def _warn_of_unseen_tokens(plan: Plan, family: Family, config: LSGConfig) -> None:
    heads = getattr(plan.attentions[0], family.names.heads)
    strided = config.sparsity_type in ("stride", "block_stride")
    if strided and (config.sparsity_factor or 0) > heads:
        logger.warning(
            "sparsity_factor=%d is more than the %d heads: some tokens are seen by none of them",
            config.sparsity_factor,
            heads,
        )


def _global_rows(
    base: nn.Module,
    family: Family,
    plan: Plan,
    config: LSGConfig,
    tokenizer: Any,
    saved: SavedGlobals | None,
) -> Tensor:
    words, count = plan.words.weight.detach(), config.num_global_tokens
    rows = words[:0]
    if saved is not None and saved.rows is not None:
        rows = _checked_rows(saved.rows, words)[:count]
        plan.bos_id = saved.bos_id
    if len(rows) == count:
        return rows.clone()
    by_mask_token = not config.random_global_init
    needs_mask = by_mask_token and count > 1
    plan.bos_id, mask_id = find_token_ids(base.config, tokenizer, needs_mask)
    added = None
    if plan.positions is not None and plan.rotary is None:
        added = plan.positions.weight.detach()[plan.offset :][: plan.global_reach]
    scale = compat.word_scale(plan.embeddings, plan.words)
    new = initial_rows(
        words,
        added,
        plan.first_token_rest,
        num_global_tokens=count,
        stride=config.global_positional_stride,
        bos_id=plan.bos_id,
        mask_id=mask_id,
        word_scale=scale * float(family.word_scale(plan.embeddings, None, None)),
        random_init=config.random_global_init,
        seed=config.seed,
    )
    return torch.cat([rows, new[len(rows) :]])


def _checked_rows(rows: Tensor, words: Tensor) -> Tensor:
    """Saved global tokens, of the type and on the device of the model's words."""
    if rows.dim() != 2 or rows.shape[1] != words.shape[1] or not rows.is_floating_point():
        raise ValueError(
            f"the saved global tokens are {rows.dtype} of shape {tuple(rows.shape)}, not floating-point "
            f"rows (n, {words.shape[1]}): they are another model's, save it again"
        )
    return rows.to(words)
