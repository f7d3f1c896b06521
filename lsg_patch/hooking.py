"""What happens where the layers begin and where they end: hooks, set to the model's own arguments."""

from __future__ import annotations

from torch import nn

from lsg_patch import compat
from lsg_patch.config import LSGConfig
from lsg_patch.families import Family
from lsg_patch.modules import causal, edges, encoder, stack
from lsg_patch.modules.arguments import Argument
from lsg_patch.modules.link import Link
from lsg_patch.plan import Plan
from lsg_patch.undo import Journal


def hook_edges(
    base: nn.Module, family: Family, plan: Plan, config: LSGConfig, journal: Journal
) -> None:
    """Hook what happens where the layers begin and where they end."""
    hook = _hook_encoder if family.embeds_in_stack else _hook_stack
    if plan.is_causal:
        hook = _hook_causal_stack
    hook(base, family, plan, config, journal)


def _hook_stack(
    base: nn.Module, family: Family, plan: Plan, config: LSGConfig, journal: Journal
) -> None:
    for name in family.methods_left_out:
        journal.set_attribute(plan.stack, name, stack.leave_out)
    enter_model = _check_of(base, family, plan, config)
    edges.before(base, enter_model, journal)
    _hook_positions(base, plan, journal)
    prepend = _hook_embeddings(base, family, plan, journal)
    of_stack = compat.forward_parameters(plan.stack)
    stack_mask = Argument.of(of_stack, *compat.MASK_NAMES)
    enter_stack = stack.EnterStack(
        config,
        prepend,
        Argument.of(of_stack, of_stack[0]),
        stack_mask,
        Argument.of(of_stack, compat.ROTATION),
        plan.rotary,
        family.relative_bias,
        plan.global_positions,
    )
    journal.before(plan.stack, enter_stack)
    collects = compat.stack_collects_hidden_states(plan.stack)
    after_stack = stack.LeaveStack(stack_mask, collects)
    journal.after(plan.stack, after_stack)
    if not collects:
        after_model = stack.LeaveModel(
            config, enter_model.mask, enter_model.wants_attentions, plan.num_layers
        )
        edges.after(base, after_model, journal)


def _check_of(owner: nn.Module, family: Family, plan: Plan, config: LSGConfig) -> stack.EnterModel:
    """What happens before the ``owner`` of the embeddings, the base model or its stack."""
    parameters = compat.forward_parameters(owner)
    inside = family.embeds_in_stack
    first_word = None
    if plan.bos_id is not None and config.mask_first_token:
        words = family.words if inside else f"{family.embeddings}.{family.words}"
        first_word = stack.FirstWord(words, plan.bos_id)
    return stack.EnterModel(
        config,
        ids=Argument.of(parameters, "input_ids"),
        embeds=Argument.of(parameters, "inputs_embeds"),
        mask=Argument.of(parameters, *compat.MASK_NAMES),
        positions=Argument.of(parameters, "position_ids"),
        head_mask=Argument.of(parameters, "head_mask"),
        wants_attentions=Argument.of(parameters, "output_attentions"),
        four_dimensions=not inside and compat.passes_masks_of_four_dimensions(owner),
        needs_head_mask=not inside and compat.expands_masks_without_head_mask(owner),
        cache=Argument.of(parameters, "past_key_values"),
        first_word=first_word,
    )


def _hook_positions(base: nn.Module, plan: Plan, journal: Journal) -> None:
    """Rotary positions of the stack's rows, where the model itself would count them."""
    if plan.rotary is None:
        return
    if compat.hands_rotation_to_stack(plan.stack):
        of_base = compat.forward_parameters(base)
        give = stack.GivePositions(
            Argument.of(of_base, "position_ids"),
            Argument.of(of_base, "input_ids"),
            Argument.of(of_base, "inputs_embeds"),
            Argument.of(of_base, *compat.MASK_NAMES),
            plan.global_positions,
        )
        edges.before(base, give, journal)
    if plan.rotary.table is not None and plan.positions is not None:
        # the stack would read as many rows as it has; its layers get theirs with the layout
        one = encoder.FirstPosition(compat.PositionInput.of(plan.positions))
        journal.before(plan.positions, one, with_kwargs=False)


def _hook_embeddings(
    base: nn.Module, family: Family, plan: Plan, journal: Journal
) -> stack.PrependGlobals | None:
    """Hook the embeddings; returns what prepends the global tokens at the stack (None: there are none)."""
    parameters = compat.forward_parameters(plan.embeddings)
    mask = Argument.of(parameters, *compat.MASK_NAMES)
    if mask.position is not None:
        compact = stack.CompactMask(mask)
        journal.before(plan.embeddings, compact)
    if plan.global_rows is None:
        return None
    journal.set_attribute(plan.stack, "lsg_base", Link(base))
    journal.before(base, stack.LinkStack(family.stack), with_kwargs=False)
    tokens = stack.GlobalTokens(
        family.global_path,
        positions=family.positions if plan.rotary is None else None,
        places=tuple(plan.offset + position for position in plan.global_positions),
    )
    note = stack.NoteGlobals(tokens, Argument.of(parameters, "input_ids"), mask, family.word_scale)
    journal.after(plan.embeddings, note)
    projection = getattr(base, family.projection, None) if family.projection else None
    if projection is not None:
        journal.after(projection, stack.carry_globals, with_kwargs=False)
    return stack.PrependGlobals(
        tokens, family.embeddings, None if projection is None else family.projection
    )


def _hook_causal_stack(
    base: nn.Module, family: Family, plan: Plan, config: LSGConfig, journal: Journal
) -> None:
    check = _check_of(base, family, plan, config)
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
    edges.before(base, enter_model, journal)
    _hook_positions(base, plan, journal)
    prepend = _hook_embeddings(base, family, plan, journal)
    of_stack = compat.forward_parameters(plan.stack)
    mask = Argument.of(of_stack, *compat.MASK_NAMES)
    enter_stack = causal.EnterCausalStack(
        config,
        prepend,
        carrier,
        hidden=Argument.of(of_stack, of_stack[0]),
        mask=mask,
        head_mask=Argument.of(of_stack, "head_mask"),
        rotary=plan.rotary,
        of_globals=plan.global_positions,
    )
    journal.before(plan.stack, enter_stack)
    leave_stack = causal.LeaveCausalStack(mask)
    journal.after(plan.stack, leave_stack)
    if not compat.stack_collects_hidden_states(plan.stack):
        leave_model = stack.LeaveModel(config, check.mask, check.wants_attentions, plan.num_layers)
        leave_decoder = causal.LeaveCausalModel(leave_model, carrier)
        edges.after(base, leave_decoder, journal)


def _hook_encoder(
    base: nn.Module, family: Family, plan: Plan, config: LSGConfig, journal: Journal
) -> None:
    parameters = compat.forward_parameters(plan.stack)
    check = _check_of(plan.stack, family, plan, config)
    carrier = compat.MaskCarrier.of(plan.stack, len(plan.attentions))
    carried = Argument.of(parameters, carrier.argument)
    # an encoder that embeds its input has a table of positions
    assert plan.positions is not None and family.positions is not None
    takes = compat.PositionInput.of(plan.positions)
    enter = encoder.EnterEncoder(
        config, check, carrier, carried, family.words, family.positions, takes
    )
    journal.before(plan.stack, enter)
    journal.before(plan.positions, encoder.FirstPosition(takes), with_kwargs=False)
    journal.after(plan.positions, encoder.no_positions, with_kwargs=False)
    for module in plan.attentions:
        of_module = compat.forward_parameters(module)
        mask = Argument.of(of_module, *compat.MASK_NAMES)
        handed_on = Argument.of(of_module, carrier.layer_argument)
        give = encoder.GiveLayout(config, carrier, handed_on, mask)
        journal.before(module, give)
    leave = encoder.LeaveEncoder(
        config, carrier, carried, check.wants_attentions, len(plan.attentions)
    )
    journal.after(plan.stack, leave)
    if plan.decoder is not None and config.pass_global_tokens_to_decoder:
        of_decoder = compat.forward_parameters(plan.decoder)
        see = encoder.EnterDecoder(
            config,
            states=Argument.of(of_decoder, "encoder_hidden_states"),
            mask=Argument.of(of_decoder, "encoder_attention_mask"),
        )
        journal.before(plan.decoder, see)
