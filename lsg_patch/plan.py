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
from lsg_patch.config import LSGConfig, SavedPatch
from lsg_patch.families import Family, Rotary, find_modules
from lsg_patch.modules.global_embeddings import global_positions, initial_rows
from lsg_patch.modules.link import others_with
from lsg_patch.modules.position_table import PositionsResized, unlike_a_table
from lsg_patch.modules.swapped import hidden_forward
from lsg_patch.offloading import device_of, kept_as_a_whole, value_of
from lsg_patch.tokenizer import find_token_ids
from lsg_patch.undo import Journal

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
    ``chunked`` are the modules that have a ``CHUNK``; ``period`` is the number of positions that are
    repeated (None: all); ``tables`` are all tables of positions, those that share a weight together;
    ``can_unpad`` says that the layers can run on packed rows.
    """

    attentions: list[nn.Module]
    stack: nn.Module
    embeddings: nn.Module
    words: nn.Module
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
    decoder: nn.Module | None
    tables: list[list[nn.Embedding]]
    period: int | None = None
    global_rows: Tensor | None = None
    bos_id: int | None = None
    is_causal: bool = False
    can_unpad: bool = True


def make_plan(
    model: nn.Module,
    base: nn.Module,
    family: Family,
    config: LSGConfig,
    tokenizer: Any,
    saved: SavedPatch | None = None,
) -> Plan:
    """Find what is to be changed in ``base``, which is ``model`` or inside of it.

    Global tokens are those that were ``saved``, and new ones.

    Raises:
        ValueError: the model is of a kind that cannot be patched, or a token id is not to be found.
        TypeError: it is not built as its family is.
    """
    if compat.has_relative_positions(base.config):
        kind = vars(base.config)["position_embedding_type"]
        raise ValueError(
            f"position_embedding_type={kind!r}: relative positions are part of the attention itself "
            "and cannot be patched; use a model with absolute ones"
        )
    _check_wrappers(model, base.modules())
    try:
        plan = _locate(model, base, family, config, saved.global_reach if saved else None)
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
    _check_modules(base, plan)
    _check_signatures(base, family, plan)
    _check_positions(plan, config)
    if saved is None and config.position_period is not None:
        plan.period = _checked_period(base, family, config)
    _warn_of_unseen_tokens(plan, family, config)
    if plan.chunked:
        logger.warning(
            "%s=%d is 0 while the model is patched: with global tokens, lengths are no multiples of it",
            CHUNK,
            getattr(plan.chunked[0], CHUNK),
        )
    if config.num_global_tokens:
        plan.global_rows = _global_rows(base.config, family, plan, config, tokenizer, saved)
    return plan


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
    embeddings = _find(base, family.embeddings)
    for name in family.global_path:
        getattr(embeddings, name)
    attentions = _find_all(base, family.attentions)
    names = family.names
    for module in attentions:
        for name in (names.query, names.key, names.value):
            module.get_submodule(name)
        for name in (names.heads, names.dropout):
            getattr(module, name)
    stack = _find(base, family.stack)
    for name in family.methods_left_out:
        getattr(stack, name)
    rotary = family.rotary
    if rotary is not None and not rotary.is_used(base.config):
        rotary = None
    positions = _positions(base, family, rotary)
    offset = 0 if positions is None else family.position_offset(positions)
    sharing: dict[Tensor, list[nn.Embedding]] = {}
    decoder_table = _table(base, family.decoder_positions) if family.decoder_positions else None
    for found in dict.fromkeys((positions, decoder_table)):
        if found is not None:
            sharing.setdefault(found.weight, []).append(found)
    own = list(model.modules())
    others = others_with([base, *sharing], own)
    for weight, of in sharing.items():
        _check_shared(weight, of, [*own, *others])
    reach = None
    if rotary is None and family.relative_bias is None and positions is not None:
        rows = positions.num_embeddings - offset
        reach = saved_reach or min(rows, int(config.position_period or rows))
        if reach > rows:
            raise ValueError(
                f"the saved global tokens are spread over {reach} positions (global_reach), "
                f"but the model has {rows}: it is another model's config, save the model again"
            )
    length = config.max_position_embeddings if reach is None else reach
    taken = global_positions(length, config.global_positional_stride, config.num_global_tokens)
    words = _find(embeddings, family.words)
    with torch.no_grad():
        rest = [family.first_token_extra(embeddings, base.config)]
        if family.token_types:
            rest.append(_looked_up(_find(embeddings, family.token_types), [0])[0])
        known = [row.detach().to(device_of(words)) for row in rest if row is not None]
    return Plan(
        attentions=attentions,
        stack=stack,
        embeddings=embeddings,
        words=words,
        positions=positions,
        rotary=rotary,
        global_positions=tuple(taken.tolist()),
        global_reach=reach,
        first_token_rest=torch.stack(known).sum(0) if known else None,
        offset=offset,
        config_offset=offset if family.config_counts_offset else 0,
        configs=configs_around(model, base, others),
        num_layers=getattr(base.config, "num_hidden_layers", len(attentions)),
        chunked=[module for module in stack.modules() if getattr(module, CHUNK, 0)],
        decoder=_find(base, family.decoder) if family.decoder else None,
        tables=list(sharing.values()),
    )


# where modules have the one that they were put around: torch.compile, activation checkpointing
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")


def _find_all(root: nn.Module, path: str) -> list[nn.Module]:
    """The modules below ``root`` at ``path``, without what was put around them, each once."""
    return list(dict.fromkeys(map(_unwrapped, find_modules(root, path))))


def _find(root: nn.Module, path: str) -> nn.Module:
    return _find_all(root, path)[0]


def _unwrapped(module: nn.Module) -> nn.Module:
    inner = next((module._modules[x] for x in WRAPPED if x in module._modules), None)
    return module if inner is None else _unwrapped(inner)


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
    """A table of positions, which is to have more of them: none that is inside of something else."""
    found = _find(base, path)
    if not isinstance(found, nn.Embedding):
        raise ValueError(
            f"{path} is a {type(found).__module__}.{type(found).__name__} and no torch.nn.Embedding, so "
            "that it cannot get more positions: patch the model first, and put an adapter on or quantize "
            "after that (of a PEFT model: merge_and_unload)"
        )
    hindrance = unlike_a_table(found)
    if hindrance:
        raise ValueError(f"{path} cannot get more positions: {hindrance}")
    return found


def _check_shared(weight: Tensor, tables: list[nn.Embedding], modules: list[nn.Module]) -> None:
    """Refuse a weight of ``tables`` of positions that another of ``modules`` has as well."""
    for other in modules:
        if other not in tables and any(weight is own for own in other._parameters.values()):
            raise ValueError(
                f"the model's table of positions shares its weight with another {type(other).__name__}, "
                "and a patch replaces it: untie the two (give one a copy of the weight), patch both "
                "models, and tie them again"
            )


@torch.no_grad()
def _looked_up(table: nn.Module, ids: list[int]) -> Tensor:
    """What ``table`` gives for ``ids``, (n, width): quantized, offloaded, with an adapter, or plain."""
    # a batch, as the hooks of others know it
    rows: Tensor = table(torch.tensor([ids], device=device_of(table)))[0]
    return rows


# around or in a model, these share out its parameters or split them: those that it has at the time
_DISTRIBUTED = (
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "FSDPModule",
    "DeepSpeedEngine",
)


def _check_wrappers(model: nn.Module, changed: Iterable[nn.Module]) -> None:
    changed = set(changed)
    for module in model.modules():
        kinds = {cls.__name__ for cls in type(module).__mro__}.intersection(_DISTRIBUTED)
        if kinds and not changed.isdisjoint(module.modules()):
            raise ValueError(
                f"a {min(kinds)} holds the parameters that the model has now, and would miss those that a "
                "patch or its revert exchanges: patch and revert the plain model (model.module of what is "
                "around it), and wrap or shard it after that. The full state dict of a sharded model "
                "loads into a plain one that is patched alike"
            )


def _check_modules(base: nn.Module, plan: Plan) -> None:
    """What other tools have made of the modules that are to be changed."""
    swapped_too = [base] if compat.is_overridden(type(base)) else []
    for module in (*plan.attentions, *swapped_too):
        hidden = hidden_forward(module)
        if hidden:
            raise ValueError(f"a {type(module).__name__} cannot be patched: {hidden}")
    changed = {plan.embeddings, *(table for tables in plan.tables for table in tables)}
    swapped = changed.union(plan.attentions, [plan.stack])
    for module in base.modules():
        if "modules_to_save" in module._modules and not swapped.isdisjoint(module.modules()):
            raise ValueError(
                "PEFT keeps a second copy of a module that a patch changes (modules_to_save): patch the "
                "model first, and put the adapter on after that"
            )
    for module in kept_as_a_whole(base):
        if changed.intersection(module.modules()):
            raise ValueError(
                f"a hook of accelerate keeps the weights of a {type(module).__name__} as a whole, where "
                "new ones have no place: patch the model first and offload it after that, or offload it "
                "without preload_module_classes"
            )


def _check_signatures(base: nn.Module, family: Family, plan: Plan) -> None:
    """What hooks and swapped modules read of a call is to be found in it."""
    owner = plan.stack if family.embeds_in_stack else base
    calls = [(x, compat.Signature.of(x)) for x in (owner, plan.stack, plan.attentions[0])]
    for module, call, name in (
        (*calls[0], "input_ids"),
        *((x, call, call.mask) for x, call in calls),
    ):
        if name not in call.names:
            own = compat.own_class(type(module))
            raise ValueError(
                f"the forward of {own.__module__}.{own.__qualname__} has no parameter {name}, by which "
                "a patch finds its input: derive the class from that of transformers and call its forward "
                "by super(), or give the parameter that name"
            )


def check_revert(model: nn.Module, records: dict[str, Journal]) -> None:
    """Whether all ``records`` of ``model``, by their paths, can be taken back.

    Raises:
        ValueError: one cannot; nothing was changed.
    """
    _check_wrappers(model, (record.owner for record in records.values()))
    present = set(model.modules())
    parts = [x for record in records.values() for x in record.changes if isinstance(x, Journal)]
    gone = [own for own in filter(_is_of_table, parts) if own.owner not in present]
    # a copy in the place of a table, as PEFT leaves it, carries a record of its own
    copies = [x for x in filter(_is_of_table, records.values()) if all(x is not y for y in parts)]
    if len(gone) > len(copies):
        raise ValueError(
            "the model's table of positions was replaced while it was patched: put that one back, then "
            "revert"
        )
    # those of single modules first: that of a base model holds them as well, and says less where
    for name, record in reversed(records.items()):
        hindrance = record.hindrance()
        if name.endswith(".base_layer"):
            hindrance = "an adapter was put on it: merge or unload that first (merge_and_unload)"
        if hindrance:
            raise ValueError(f"model.{name} cannot be reverted, so nothing was: {hindrance}")


def _is_of_table(record: Journal) -> bool:
    return any(isinstance(change, PositionsResized) for change in record.changes)


def configs_around(
    model: nn.Module, base: nn.Module, others: Iterable[nn.Module] = ()
) -> dict[str, Any]:
    """The configs that state the length of ``base``, by where they are: its own, and those of the
    modules around it in ``model`` and of ``others`` that have it (two heads may have one encoder), if
    they are of its kind. Mostly they are one and the same object.
    """
    path = next(name for name, module in model.named_modules() if module is base)
    names = ("", *accumulate(path.split("."), "{}.{}".format))
    owners = {f"model.{name}".rstrip("."): model.get_submodule(name) for name in names}
    owners |= {f"(a {type(other).__name__} that has the encoder too)": other for other in others}
    found: dict[str, Any] = {}
    for name, owner in owners.items():
        config = getattr(owner, "config", None)
        known = any(config is other for other in found.values())
        if type(config) is type(base.config) and not known:
            found[f"{name}.config"] = config
    return found


def _check_positions(plan: Plan, config: LSGConfig) -> None:
    if plan.positions is None:
        return  # no table, no end
    count = plan.positions.num_embeddings - plan.offset
    rows = count + plan.config_offset
    for name, model_config in plan.configs.items():
        stated = model_config.max_position_embeddings
        if stated != rows:
            raise ValueError(
                f"{name}.max_position_embeddings is {stated}, but the model has a table of {rows}. If "
                "another patched model shares this config object, unpatch that one, give this one its "
                "own (model = copy.deepcopy(model)) and patch them anew; else set the number to the "
                "table's"
            )
    length = config.max_position_embeddings
    if length < count:
        logger.warning(
            "max_position_embeddings=%d shortens the model's %d positions", length, count
        )


def learned_tables(base: nn.Module, family: Family) -> tuple[list[nn.Embedding], int]:
    """The tables of learned positions, the decoder's last, and the number of rows before position 0.

    There are none where positions are computed or rotary.
    """
    rotary = family.rotary is not None and family.rotary.is_used(base.config)
    if rotary or family.positions is None:
        return [], 0
    positions = _table(base, f"{family.embeddings}.{family.positions}")
    offset, rows = family.position_offset(positions), value_of(positions).detach()
    if family.computed_positions(rows, offset, 1, base.config) is not None:
        return [], 0
    decoder = family.decoder_positions
    return [positions, *([_table(base, decoder)] if decoder else [])], offset


def _checked_period(base: nn.Module, family: Family, config: LSGConfig) -> int:
    period = int(config.position_period or 0)
    tables, offset = learned_tables(base, family)
    if not tables:
        raise ValueError(
            f"position_period={period}, but the positions of a {type(base).__name__} are computed and "
            "not learned: pass position_period=None"
        )
    rows = tables[0].num_embeddings - offset
    if period > rows:
        raise ValueError(
            f"position_period={period}, but the model has {rows} positions: pass at most {rows}"
        )
    if period < min(2 * config.block_size, rows):
        logger.warning(
            "position_period=%d is less than two blocks of %d: inputs of more than %d tokens are not "
            "what they were, as they are up to two blocks with a longer period or smaller blocks",
            period,
            config.block_size,
            period,
        )
    return period


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
    config_of_model: Any,
    family: Family,
    plan: Plan,
    config: LSGConfig,
    tokenizer: Any,
    saved: SavedPatch | None,
) -> Tensor:
    count, rows = config.num_global_tokens, None
    if saved is not None and saved.rows is not None:
        rows = _checked_rows(saved.rows, plan.words)[:count].clone()
        plan.bos_id = saved.bos_id
        if len(rows) == count:
            return rows
    needs_mask = count > 1 and not config.random_global_init
    bos_id, mask_id = find_token_ids(config_of_model, tokenizer, needs_mask)
    plan.bos_id = bos_id
    added = None
    if plan.positions is not None and plan.rotary is None:
        added = value_of(plan.positions).detach()[plan.offset :][: plan.global_reach]
        added = added.to(device_of(plan.words))
    ids = [bos_id] if mask_id is None else [bos_id, mask_id]
    if config.random_global_init:  # it asks for all of them, as they are numbered
        ids = list(range(getattr(plan.words, "num_embeddings", config_of_model.vocab_size)))
    scale = compat.scale_of_looked_up_words(plan.embeddings)
    new = initial_rows(
        _looked_up(plan.words, ids),
        added,
        plan.first_token_rest,
        num_global_tokens=count,
        stride=config.global_positional_stride,
        bos_id=ids.index(bos_id),
        mask_id=None if mask_id is None else ids.index(mask_id),
        word_scale=scale * float(family.word_scale(plan.embeddings, None, None)),
        random_init=config.random_global_init,
        seed=config.seed,
    )
    return new if rows is None else torch.cat([rows, new[len(rows) :]])


def _checked_rows(rows: Tensor, words: nn.Module) -> Tensor:
    """Saved global tokens, of the type and on the device of the model's ``words``."""
    word = _looked_up(words, [0])
    if rows.dim() != 2 or rows.shape[1] != word.shape[1] or not rows.is_floating_point():
        raise ValueError(
            f"the saved global tokens are {rows.dtype} of shape {tuple(rows.shape)}, not floating-point "
            f"rows (n, {word.shape[1]}): they are another model's, save it again"
        )
    return rows.to(word)
