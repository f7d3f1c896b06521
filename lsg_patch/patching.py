"""patch_model and its reversal: the only place that changes a model."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import nn

from lsg_patch.config import KEY, TRAINED, LSGConfig, SavedPatch
from lsg_patch.families import FAMILIES, Family, find_base
from lsg_patch.holders import Holder, module_of, owners_of, set_limits, stated_limit, tokenizer_in
from lsg_patch.hooking import hook_edges
from lsg_patch.loading import CheckStateDict, check_adapters
from lsg_patch.modules.global_embeddings import GlobalEmbeddings
from lsg_patch.modules.link import Link
from lsg_patch.modules.new_rows import join, split
from lsg_patch.modules.position_table import (
    RESIZED,
    PositionsResized,
    resize_buffers,
    resize_positions,
)
from lsg_patch.modules.self_attention import swap_attention
from lsg_patch.offloading import value_of
from lsg_patch.plan import CHUNK, Plan, check_revert, configs_around, learned_tables, make_plan
from lsg_patch.published import is_published
from lsg_patch.tokenizer import is_tokenizer
from lsg_patch.undo import Journal, record_of, records_of

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module | Holder)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
GLOBAL_EMBEDDINGS = "global_embeddings"
# of a model, that may train while the rest does not
PARTS = ("global", "positions", "new_positions", "head")


@dataclass(kw_only=True)
class Patch(Journal):
    """What a patched base model carries: the record of all changes, and the settings.

    ``stated_length`` is what the model's config said before, ``patched_length`` what it says now, and
    ``saved`` what it says under ``KEY``.
    """

    config: LSGConfig
    family: str
    stated_length: int | None
    patched_length: int
    saved: dict[str, Any]


def _settings_once(patch: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Refuse settings beside an ``LSGConfig``, also those that happen to be the defaults."""
    signature = inspect.signature(patch)
    names = {field.name for field in fields(LSGConfig)} - {"block_size"}

    @functools.wraps(patch)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        given = signature.bind(*args, **kwargs).arguments
        others = [name for name in given if name in names]
        if others and isinstance(given.get("block_size"), LSGConfig):
            raise TypeError(
                f"an LSGConfig was given, and {', '.join(others)} as well: put all settings into one"
            )
        return patch(*args, **kwargs)

    return checked


@_settings_once
def patch_model(
    model: Model,
    block_size: int | LSGConfig = 128,
    sparsity_type: str = "norm",
    *,
    sparse_block_size: int | None = 128,
    sparsity_factor: int | None = 2,
    num_global_tokens: int = 1,
    max_position_embeddings: int = 4096,
    positions: str = "tile",
    position_period: int | str | None = None,
    mask_first_token: bool | None = None,
    pool_with_global: bool = True,
    adaptive: bool = True,
    unpad: bool | None = None,
    lsh_num_pre_rounds: int = 1,
    pass_global_tokens_to_decoder: bool = False,
    attention_probs_dropout_prob: float | None = None,
    global_positional_stride: int = 64,
    random_global_init: bool = False,
    tokenizer: Any = None,
    backend: str = "auto",
    seed: int | None = None,
) -> Model:
    """Make a loaded model read long inputs, in place: LSG attention, more positions, global tokens.

    The model stays an instance of its class, with its heads, its parameters (only the position table is a
    new one), the shapes of its outputs. ``unpatch_model`` gives back exactly what it was.
    In an encoder-decoder the encoder's self-attention is patched, and the decoder's position table
    grows as the encoder's does. A decoder (``config.is_decoder``) attends block by block to the
    tokens before each token; a step that is given a cache sees all of it. Cross attention stays.
    ``position_ids`` that are given are taken as they are, also beyond ``max_position_embeddings``.
    Hooks of yours inside the layer stack see its rows, [global tokens | tokens | padding]; of a
    batch that is run unpadded those of all sequences in one.

    Args:
        model: a model of a supported family, with or without a head, or a module that holds one
            (``SentenceTransformer``, ``CrossEncoder``), or a pipeline.
        block_size: tokens a block, or an ``LSGConfig`` in place of all settings.
        tokenizer: where the ids of the cls/bos and mask tokens come from, and whose
            ``model_max_length`` is set to ``max_position_embeddings``. By default that of a pipeline
            or a module that holds one, whose own limits are set in any case. Where there is none, the
            ids come from the model's config, else from the tokenizer of ``config._name_or_path``.

    For all other arguments see ``LSGConfig``.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: a setting is wrong, two do not fit, or the model cannot be patched as it is.
        TypeError: ``model`` is not of a supported family.

    A patch that fails leaves the model as it was.
    """
    if isinstance(block_size, LSGConfig):
        return patch_with(model, block_size, tokenizer)
    given = dict(locals())
    config = LSGConfig(**{field.name: given[field.name] for field in fields(LSGConfig)})
    return patch_with(model, config, tokenizer)


def patch_with(
    model: Model, config: LSGConfig, tokenizer: Any = None, saved: SavedPatch | None = None
) -> Model:
    """``patch_model`` with all settings in one, also of a model that was ``saved`` patched.

    Of such a model the positions are taken as they are, unless ``config`` has another number of them,
    and the saved global tokens come first. A revert gives the model that was loaded, without ``KEY``
    in its config.
    """
    module = module_of(model)
    base, family = find_base(module)
    if tokenizer is not None and not is_tokenizer(tokenizer):
        raise TypeError(
            f"tokenizer must be the model's tokenizer or None, not {tokenizer!r}: pass "
            "AutoTokenizer.from_pretrained(...)"
        )
    if any(True for _ in records_of(base)):
        raise ValueError(
            f"{type(base).__name__}, or a module in it, is patched already: unpatch_model(model) first, "
            "then patch it anew"
        )
    if saved is None and (KEY in vars(base.config) or is_published(vars(base.config))):
        logger.warning(
            "%s was saved patched and loaded without that: it is patched anew, with new global tokens. "
            "lsg_patch.from_pretrained loads it as it was saved",
            type(base).__name__,
        )
    config = config.with_family_default(family.begins_with_cls)
    check_adapters(module, GLOBAL_EMBEDDINGS)
    owners = owners_of(model, base)
    ids_from = tokenizer_in(owners[0]) if tokenizer is None and owners else tokenizer
    if config.position_period == TRAINED:
        config = replace(config, position_period=_trained_length(base, owners, tokenizer))
    # tensors made in inference mode could never be trained; on a CPU whatever the default device is
    with torch.inference_mode(False), torch.device("cpu"):
        plan = make_plan(module, base, family, config, ids_from, saved)
        if not plan.can_unpad:
            config = replace(config, unpad=False)
        length, reach = config.max_position_embeddings, plan.global_reach
        stated = getattr(base.config, "max_position_embeddings", None)
        patch = Patch(
            base,
            config=config,
            family=family.name,
            stated_length=stated,
            patched_length=length + plan.config_offset,
            saved=SavedPatch(config, reach and min(reach, length), plan.bos_id).to_dict(),
        )
        try:
            patch.attach()
            for model_config in plan.configs.values():
                if saved is not None:
                    vars(model_config).pop(KEY, None)
                patch.set_attribute(model_config, KEY, patch.saved)
            _apply(base, family, config, plan, patch)
            readable = None if stated is None else stated - plan.config_offset
            # who loads a model that is patched, loads its tokenizer as well
            if not set_limits(owners, tokenizer, length, readable, patch) and saved is None:
                logger.warning(
                    "no tokenizer was given, and the model holds none: its inputs may go on being "
                    "truncated elsewhere, at a tokenizer's model_max_length; tokenizer= raises that to %d",
                    length,
                )
            logger.info(
                "patched %s: %d attention modules, %d positions, %d global tokens",
                type(base).__name__,
                len(plan.attentions),
                length,
                config.num_global_tokens,
            )
            return model
        except BaseException:
            patch.undo()
            raise


def _trained_length(base: nn.Module, owners: list[Any], tokenizer: Any) -> int:
    found = stated_limit(owners, tokenizer, getattr(base.config, "max_position_embeddings", 0))
    if found is None:
        raise ValueError(
            f"position_period={TRAINED!r}, but no tokenizer says at which length the model was used: "
            "pass tokenizer=, or the number"
        )
    logger.info("position_period is %d, %s", *found)
    return found[0]


def unpatch_model(model: Model) -> Model:
    """Give back what ``patch_model`` changed, exactly; returns ``model``.

    Parameters of the attention were the same all the time, so what they learned stays. The
    position table is the old parameter again; its rows keep what they learned, those behind
    ``position_period`` and those that ``positions="interpolate"`` stretched are what they were
    before. Global tokens go. Layers that were copied or moved into ``model`` from a patched one are
    reverted as well.

    Raises:
        ValueError: nothing in ``model`` is patched; or it was changed while it was, so that it could
            not be reverted as a whole: then nothing is.
        RuntimeError: something failed all the same. The rest is reverted; what is left is named, and
            a further call tries it again.
    """
    module = module_of(model)
    records = dict(records_of(module))
    of_pipeline = None if model is module else record_of(model)
    if of_pipeline is not None:
        records["pipeline"] = of_pipeline
    if not records:
        _require_patched(model)
    check_revert(module, records)
    failed: Exception | None = None
    with torch.inference_mode(False):
        # a base model comes before what is in it, the records of which are mostly empty by their turn
        for record in records.values():
            try:
                record.undo()
            except Exception as error:
                failed = error
    # a config that was put in the place of the one that was changed states the same too
    for name, patch in records.items():
        if not isinstance(patch, Patch) or patch.changes:
            continue
        for config in configs_around(module, module.get_submodule(name)).values():
            if vars(config).get(KEY) == patch.saved:
                delattr(config, KEY)
            if getattr(config, "max_position_embeddings", None) == patch.patched_length:
                config.max_position_embeddings = patch.stated_length
    if failed is not None:
        left = ", ".join(f"model.{name}" for name, record in records.items() if record.changes)
        raise RuntimeError(
            f"the model is reverted but for something in {left} ({failed}): mend that and call "
            "unpatch_model(model) again"
        ) from failed
    return model


def freeze_except_global(model: Model, train_head: bool = True) -> Model:
    """``freeze_except(model, "global", "head")``, or ``"global"`` alone: the cheapest way to fit a
    patched model to long inputs.
    """
    return freeze_except(model, "global", *["head"] * train_head)


def freeze_except(model: Model, *parts: str) -> Model:
    """Leave only these parts of a patched model trainable; build the optimizer after that.

    ``requires_grad_(True)`` takes it back.

    Args:
        parts: "global", the global tokens; "positions", the tables of learned positions;
            "new_positions", their rows behind those that the model had (behind ``position_period``
            where that is given): a parameter ``new_rows`` of its own, so that short inputs keep their
            positions bit for bit with any optimizer; state dicts have the whole table. "head": what is
            outside the base model, without weights that it shares with that (a language model's words).

    Returns:
        ``model`` itself.

    Raises:
        ValueError: there is no such part, the model lacks it, or two do not fit; nothing is changed.
    """
    known = parts and all(isinstance(part, str) and part in PARTS for part in parts)
    if not known or {"positions", "new_positions"} <= set(parts):
        raise ValueError(
            f"freeze_except: pass some of {', '.join(PARTS)}, of the two positions only one, not {parts!r}"
        )
    module, patches, new = module_of(model), _require_patched(model), "new_positions" in parts
    trained = [global_embeddings(base) for base, _ in patches] if "global" in parts else []
    with_positions = patches if new or "positions" in parts else []
    found = [(patch, *_tables_to_train(base, patch, new)) for base, patch in with_positions]
    of_bases = {id(p) for base, _ in patches for p in base.parameters()}
    head = [p for p in module.parameters() if id(p) not in of_bases]
    if parts == ("head",) and not head:
        raise ValueError(f"'head', but the {type(module).__name__} has none: pass another part")
    join(module)
    for patch, tables, old in found:
        sharing: dict[int, list[nn.Embedding]] = {}
        for table in tables:
            sharing.setdefault(id(table.weight), []).append(table)
        for group in sharing.values():
            whole = cast("nn.Parameter", group[0].weight)
            trained.append(split(group, old, patch) if new else whole)
    trained += head if "head" in parts else []
    ids = {id(x) for x in trained}
    for parameter in module.parameters():
        parameter.requires_grad_(id(parameter) in ids)
    return model


def _tables_to_train(base: nn.Module, patch: Patch, new: bool) -> tuple[list[nn.Embedding], int]:
    """Tables of learned positions, and how many of their rows are those that the model had before."""
    tables, offset = learned_tables(base, FAMILIES[patch.family])
    if not tables or any(table.weight.is_meta for table in tables):
        raise ValueError(
            f"the positions of this {type(base).__name__} are computed, or offloaded: leave "
            "'positions' out, or load the model onto a device"
        )
    if not new:
        return tables, 0
    count = tables[0].num_embeddings - offset
    changes = getattr(record_of(tables[0]), "changes", [])
    resized = [change.common - offset for change in changes if isinstance(change, PositionsResized)]
    known: int | None = resized[0] if resized else patch.saved["global_reach"]
    if known is None or patch.config.positions != "tile" or known >= count:
        raise ValueError(
            f"'new_positions', but which of the {count} positions are new is not known, or none is, or "
            "(positions='interpolate') all are: pass 'positions'"
        )
    return tables, offset + known


def _with_arguments_of(
    patch: Callable[Arguments, Result],
) -> Callable[[Callable[..., Any]], Callable[Arguments, AbstractContextManager[Result]]]:
    """What type checkers are told of a ``with`` block: it takes what ``patch`` takes."""
    return lambda block: block


@_with_arguments_of(patch_model)
@contextmanager
def patched(model: Model, *args: Any, **kwargs: Any) -> Iterator[Model]:
    """A patch for the time of a ``with`` block; leaving it reverts, also by an exception.

    Takes the arguments of ``patch_model`` and gives the model.
    """
    before = len(_patches(model))
    try:
        # in here: an interrupt just after it reverts, too
        patch_model(model, *args, **kwargs)
        yield model
    finally:
        if len(_patches(model)) > before:
            unpatch_model(model)


def is_patched(model: nn.Module | Holder) -> bool:
    """Whether ``model`` is patched, or holds a model that is."""
    return bool(_patches(model))


def get_config(model: nn.Module | Holder) -> LSGConfig:
    """The settings in force in a patched model; defaults of its family are filled in.

    Raises:
        ValueError: ``model`` is not patched.
    """
    _, patch = _require_patched(model)[0]
    return patch.config


def global_embeddings(model: nn.Module | Holder) -> nn.Parameter:
    """The trainable embeddings of the global tokens, (num_global_tokens, width).

    Those that a forward takes: where a tool keeps several (PEFT's modules_to_save), the active ones.

    Raises:
        ValueError: ``model`` is not patched, or patched with ``num_global_tokens=0``.
    """
    base, patch = _require_patched(model)[0]
    embeddings: Any = base.get_submodule(FAMILIES[patch.family].embeddings)
    if not hasattr(embeddings, "lsg_self"):
        raise ValueError("the model is patched with num_global_tokens=0: it has no global tokens")
    rows: nn.Parameter = getattr(embeddings.lsg_self.module, GLOBAL_EMBEDDINGS).weight
    return rows


def _apply(
    base: nn.Module, family: Family, config: LSGConfig, plan: Plan, journal: Journal
) -> None:
    """Make the changes, recording each of them."""
    length = config.max_position_embeddings
    for tables in plan.tables:
        if plan.period is None and tables[0].num_embeddings == plan.offset + length:
            continue  # as many rows as wanted: they are taken as they are
        rows = value_of(tables[0]).detach()[: plan.period and plan.offset + plan.period]
        common = len(rows)
        resized = family.computed_positions(rows, plan.offset, length, base.config)
        if resized is None:
            resized = RESIZED[config.positions](rows, plan.offset, length)
            common = 0 if config.positions == "interpolate" else common
        resize_positions(tables, resized, journal, common)
    resize_buffers(plan.embeddings, family.position_buffers, length + plan.offset, journal)
    for model_config in plan.configs.values():
        journal.set_attribute(model_config, "max_position_embeddings", length + plan.config_offset)
    for module in plan.chunked:
        journal.set_attribute(module, CHUNK, 0)
    for index, module in enumerate(plan.attentions):
        # every layer its own projections; a seed gives the same ones each time
        seed = (config.seed or 0) + index
        swap_attention(module, config, family, seed, journal, plan.is_causal)
    if plan.global_rows is not None:
        journal.add(plan.embeddings, GLOBAL_EMBEDDINGS, GlobalEmbeddings(plan.global_rows))
        journal.set_attribute(plan.embeddings, "lsg_self", Link(plan.embeddings))
    hook_edges(base, family, plan, config, journal)
    changed = {table.weight for tables in plan.tables for table in tables}
    names = tuple(name for name, parameter in base.named_parameters() if parameter in changed)
    check = CheckStateDict(GLOBAL_EMBEDDINGS, names)
    journal.hook(base, base._register_load_state_dict_pre_hook, check, with_module=True)


def _patches(model: nn.Module | Holder) -> list[tuple[nn.Module, Patch]]:
    """The patched base models in ``model``."""
    found = ((module, record_of(module)) for module in module_of(model).modules())
    return [(module, record) for module, record in found if isinstance(record, Patch)]


def _require_patched(model: nn.Module | Holder) -> list[tuple[nn.Module, Patch]]:
    patches = _patches(model)
    if not patches:
        raise ValueError(f"{type(model).__name__} is not patched: patch_model(model) patches it")
    return patches
