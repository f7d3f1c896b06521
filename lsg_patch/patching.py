"""patch_model and its reversal: the only place that changes a model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import nn

from lsg_patch import compat
from lsg_patch.config import LSGConfig
from lsg_patch.families import Family, find_base
from lsg_patch.modules import causal, encoder, stack
from lsg_patch.modules.arguments import Argument
from lsg_patch.modules.global_embeddings import GlobalEmbeddings
from lsg_patch.modules.position_table import resize_buffers, resize_positions
from lsg_patch.modules.self_attention import swap_attention
from lsg_patch.plan import Plan, make_plan
from lsg_patch.tokenizer import set_max_length
from lsg_patch.undo import Journal

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)
GLOBAL_EMBEDDINGS = "global_embeddings"
PATCH = "_lsg_patch"


@dataclass
class Patch:
    """What a patched base model carries: its settings, and how to undo them."""

    config: LSGConfig
    family: str
    journal: Journal


def patch_model(
    model: Model,
    block_size: int | LSGConfig = 128,
    sparsity_type: str = "norm",
    *,
    sparse_block_size: int | None = 128,
    sparsity_factor: int | None = 2,
    num_global_tokens: int = 1,
    max_position_embeddings: int = 4096,
    mask_first_token: bool | None = None,
    pool_with_global: bool = True,
    adaptive: bool = True,
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

    The model stays what it is: its class, its heads, its parameters (only the position table is a
    new one), the shapes of its outputs. ``unpatch_model`` gives back exactly what it was.
    In an encoder-decoder the encoder's self-attention is patched; the decoder's and the cross
    attention stay full, and only the decoder's position table grows as the encoder's does.
    A decoder (``config.is_decoder``) attends block by block to what stands before each token. It
    keeps keys and values as the unpatched one does; a step that is given a cache sees all of it.
    Cross attention stays as it is.

    Args:
        model: a model of a supported family, with or without a head, or a module that holds one.
        block_size: tokens a block, or an ``LSGConfig`` in place of all settings.
        tokenizer: where the ids of the cls/bos and mask tokens come from, and whose
            ``model_max_length`` is set to ``max_position_embeddings``. By default the ids come from
            the model's config, else from the tokenizer of ``config._name_or_path``.

    For all other arguments see ``LSGConfig``.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: a setting is wrong, two do not fit, the model is patched already, is told to be a
            decoder and is none, has relative positions, or a token id is not to be found.
        TypeError: ``model`` is not of a supported family.

    A patch that fails leaves the model as it was.
    """
    given = dict(locals())
    settings = {field.name: given[field.name] for field in fields(LSGConfig)}
    config = _config(block_size, settings)
    base, family = find_base(model)
    config = config.with_family_default(family.begins_with_cls)
    if is_patched(base):
        raise ValueError(
            f"{type(base).__name__} is patched already: unpatch_model(model) first, then patch it anew"
        )
    journal = Journal()
    # tensors made in inference mode could never be trained
    with torch.inference_mode(False):
        plan = make_plan(base, family, config, tokenizer)
        try:
            _apply(base, family, config, plan, tokenizer, journal)
            journal.set_attribute(base, PATCH, Patch(config, family.name, journal))
        except BaseException:
            journal.undo()
            raise
    logger.info(
        "patched %s: %d attention modules, %d positions, %d global tokens",
        type(base).__name__,
        len(plan.attentions),
        config.max_position_embeddings,
        config.num_global_tokens,
    )
    return model


def unpatch_model(model: Model) -> Model:
    """Give back what ``patch_model`` changed, exactly; returns ``model``.

    Parameters of the attention were the same all the time, so what they learned stays. The
    position table is the old parameter again; its rows keep what they learned. Global tokens go.

    Raises:
        ValueError: ``model`` is not patched.
    """
    for base in _require_patched(model):
        for module in base.modules():
            _drop_stale_forward(module)
        patch: Patch = vars(base)[PATCH]
        with torch.inference_mode(False):
            patch.journal.undo()
    return model


def freeze_except_global(model: Model, train_head: bool = True) -> Model:
    """Leave only the global tokens trainable, and with ``train_head`` what is outside the base model.

    The cheapest way to fit a patched model to long inputs. Weights that a head shares with the base
    model (a language model's words) are frozen. ``requires_grad_(True)`` takes it back.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: ``model`` is not patched, or patched with ``num_global_tokens=0``.
    """
    trained = global_embeddings(model)
    of_bases = {id(p) for base in _require_patched(model) for p in base.parameters()}
    for parameter in model.parameters():
        in_head = train_head and id(parameter) not in of_bases
        parameter.requires_grad_(parameter is trained or in_head)
    return model


@contextmanager
def patched(model: Model, *args: Any, **kwargs: Any) -> Iterator[Model]:
    """A patch for the time of a ``with`` block; leaving it reverts, also by an exception.

    Takes the arguments of ``patch_model`` and gives the model.
    """
    patch_model(model, *args, **kwargs)
    try:
        yield model
    finally:
        if is_patched(model):
            unpatch_model(model)


def is_patched(model: nn.Module) -> bool:
    """Whether ``model`` is patched, or holds a model that is."""
    return bool(_patched_bases(model))


def get_config(model: nn.Module) -> LSGConfig:
    """The settings in force in a patched model; defaults of its family are filled in.

    Raises:
        ValueError: ``model`` is not patched.
    """
    config: LSGConfig = vars(_require_patched(model)[0])[PATCH].config
    return config


def global_embeddings(model: nn.Module) -> nn.Parameter:
    """The trainable embeddings of the global tokens, (num_global_tokens, width).

    Raises:
        ValueError: ``model`` is not patched, or patched with ``num_global_tokens=0``.
    """
    for module in _require_patched(model)[0].modules():
        if isinstance(module, GlobalEmbeddings):
            return module.weight
    raise ValueError("the model is patched with num_global_tokens=0: it has no global tokens")


def _config(block_size: int | LSGConfig, settings: dict[str, Any]) -> LSGConfig:
    if not isinstance(block_size, LSGConfig):
        return LSGConfig(**settings)
    defaults = LSGConfig()
    others = [
        name
        for name, value in settings.items()
        if name != "block_size" and value != getattr(defaults, name)
    ]
    if others:
        raise TypeError(
            f"an LSGConfig was given, and {', '.join(others)} as well: put all settings into one"
        )
    return block_size


def _apply(
    base: nn.Module, family: Family, config: LSGConfig, plan: Plan, tokenizer: Any, journal: Journal
) -> None:
    """Make the changes, recording each of them."""
    for module in base.modules():
        _drop_stale_forward(module)
    length = config.max_position_embeddings
    for table in (plan.positions, plan.decoder_positions):
        if table is not None:
            rows = table.weight.detach()
            grown = family.grow_positions(rows, plan.offset, length, base.config)
            resize_positions(table, grown, journal)
    resize_buffers(plan.embeddings, family.position_buffers, length + plan.offset, journal)
    model_config: Any = base.config
    if model_config.max_position_embeddings != length + plan.config_offset:
        journal.set_attribute(model_config, "max_position_embeddings", length + plan.config_offset)
    for index, module in enumerate(plan.attentions):
        # every layer its own projections; a seed gives the same ones each time
        seed = (config.seed or 0) + index
        swap_attention(module, config, family, seed, journal, plan.is_causal)
    if plan.global_rows is not None:
        journal.add_module(plan.embeddings, GLOBAL_EMBEDDINGS, GlobalEmbeddings(plan.global_rows))
    _hook_edges(base, family, plan, config, journal)
    if tokenizer is not None and hasattr(tokenizer, "model_max_length"):
        journal.record(set_max_length(tokenizer, length))


def _hook_edges(
    base: nn.Module, family: Family, plan: Plan, config: LSGConfig, journal: Journal
) -> None:
    """Hook what happens where the layers begin and where they end."""
    hook = {"stack": _hook_stack, "encoder": _hook_encoder}[family.edge]
    if plan.is_causal:
        hook = _hook_causal_stack
    hook(base, family, plan, config, journal)


def _hook_stack(
    base: nn.Module, family: Family, plan: Plan, config: LSGConfig, journal: Journal
) -> None:
    _hook_globals(family, plan, journal)
    enter_model = _check_of(base, config)
    journal.add_hook(base.register_forward_pre_hook(enter_model, with_kwargs=True))
    of_stack = compat.forward_parameters(plan.stack)
    stack_mask = Argument.of(of_stack, *compat.MASK_NAMES)
    enter_stack = stack.EnterStack(config, Argument.of(of_stack, of_stack[0]), stack_mask)
    journal.add_hook(plan.stack.register_forward_pre_hook(enter_stack, with_kwargs=True))
    # before other hooks on the outputs, which then see what the unpatched model gives
    collects = compat.stack_collects_hidden_states(plan.stack)
    after_stack = stack.LeaveStack(stack_mask, collects)
    journal.add_hook(plan.stack.register_forward_hook(after_stack, with_kwargs=True, prepend=True))
    if not collects:
        after_model = stack.LeaveModel(
            config, enter_model.mask, enter_model.wants_attentions, plan.num_layers
        )
        journal.add_hook(base.register_forward_hook(after_model, with_kwargs=True, prepend=True))


def _hook_globals(family: Family, plan: Plan, journal: Journal) -> None:
    if plan.global_rows is not None:
        prepend = stack.PrependGlobals(family.global_path)
        journal.add_hook(plan.embeddings.register_forward_hook(prepend, prepend=True))


def _check_of(base: nn.Module, config: LSGConfig) -> stack.EnterModel:
    """What happens before a base model that has its embeddings outside of its stack."""
    parameters = compat.forward_parameters(base)
    return stack.EnterModel(
        config,
        ids=Argument.of(parameters, "input_ids"),
        embeds=Argument.of(parameters, "inputs_embeds"),
        mask=Argument.of(parameters, *compat.MASK_NAMES),
        positions=Argument.of(parameters, "position_ids"),
        head_mask=Argument.of(parameters, "head_mask"),
        wants_attentions=Argument.of(parameters, "output_attentions"),
        four_dimensions=compat.passes_masks_of_four_dimensions(base),
        needs_head_mask=compat.expands_masks_without_head_mask(base),
    )


def _hook_causal_stack(
    base: nn.Module, family: Family, plan: Plan, config: LSGConfig, journal: Journal
) -> None:
    _hook_globals(family, plan, journal)
    check = _check_of(base, config)
    carrier = compat.CausalMaskCarrier.of(base, plan.num_layers)
    of_base = compat.forward_parameters(base)
    enter_model = causal.EnterCausalModel(
        check,
        cache=Argument.of(of_base, "past_key_values"),
        carrier=carrier,
        states=Argument.of(of_base, "encoder_hidden_states"),
        states_mask=Argument.of(of_base, "encoder_attention_mask"),
        cross_mask=compat.CrossMask.of(base),
    )
    journal.add_hook(base.register_forward_pre_hook(enter_model, with_kwargs=True))
    of_stack = compat.forward_parameters(plan.stack)
    mask = Argument.of(of_stack, *compat.MASK_NAMES)
    enter_stack = causal.EnterCausalStack(
        config,
        carrier,
        hidden=Argument.of(of_stack, of_stack[0]),
        mask=mask,
        head_mask=Argument.of(of_stack, "head_mask"),
    )
    journal.add_hook(plan.stack.register_forward_pre_hook(enter_stack, with_kwargs=True))
    # before other hooks on the outputs, which then see what the unpatched model gives
    leave_stack = causal.LeaveCausalStack(mask)
    journal.add_hook(plan.stack.register_forward_hook(leave_stack, with_kwargs=True, prepend=True))
    if not compat.stack_collects_hidden_states(plan.stack):
        leave_model = stack.LeaveModel(config, check.mask, check.wants_attentions, plan.num_layers)
        leave_decoder = causal.LeaveCausalModel(leave_model, carrier)
        journal.add_hook(base.register_forward_hook(leave_decoder, with_kwargs=True, prepend=True))


def _hook_encoder(
    base: nn.Module, family: Family, plan: Plan, config: LSGConfig, journal: Journal
) -> None:
    parameters = compat.forward_parameters(plan.stack)
    attentions = Argument.of(parameters, "output_attentions")
    check = stack.EnterModel(
        config,
        ids=Argument.of(parameters, "input_ids"),
        embeds=Argument.of(parameters, "inputs_embeds"),
        mask=Argument.of(parameters, *compat.MASK_NAMES),
        positions=Argument.of(parameters, "position_ids"),
        head_mask=Argument.of(parameters, "head_mask"),
        wants_attentions=attentions,
        four_dimensions=False,
        needs_head_mask=False,
    )
    carrier = compat.MaskCarrier.of(plan.stack, len(plan.attentions))
    carried = Argument.of(parameters, carrier.argument)
    takes = compat.PositionInput.of(plan.positions)
    enter = encoder.EnterEncoder(
        config, check, carrier, carried, family.words, family.positions, takes
    )
    journal.add_hook(plan.stack.register_forward_pre_hook(enter, with_kwargs=True))
    journal.add_hook(plan.positions.register_forward_pre_hook(encoder.FirstPosition(takes)))
    journal.add_hook(plan.positions.register_forward_hook(encoder.no_positions))
    for module in plan.attentions:
        of_module = compat.forward_parameters(module)
        mask = Argument.of(of_module, *compat.MASK_NAMES)
        handed_on = Argument.of(of_module, carrier.layer_argument)
        give = encoder.GiveLayout(config, carrier, handed_on, mask)
        journal.add_hook(module.register_forward_pre_hook(give, with_kwargs=True))
    # before other hooks on the outputs, which then see what the unpatched model gives
    leave = encoder.LeaveEncoder(config, carrier, carried, attentions, len(plan.attentions))
    journal.add_hook(plan.stack.register_forward_hook(leave, with_kwargs=True, prepend=True))
    if plan.decoder is not None and config.pass_global_tokens_to_decoder:
        of_decoder = compat.forward_parameters(plan.decoder)
        see = encoder.EnterDecoder(
            config,
            states=Argument.of(of_decoder, "encoder_hidden_states"),
            mask=Argument.of(of_decoder, "encoder_attention_mask"),
        )
        journal.add_hook(plan.decoder.register_forward_pre_hook(see, with_kwargs=True))


def _drop_stale_forward(module: nn.Module) -> None:
    own = vars(module).get("forward")
    if own is not None and compat.is_left_behind(module, own):
        del module.forward


def _patched_bases(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if PATCH in vars(module)]


def _require_patched(model: nn.Module) -> list[nn.Module]:
    bases = _patched_bases(model)
    if not bases:
        raise ValueError(f"{type(model).__name__} is not patched: patch_model(model) patches it")
    return bases
