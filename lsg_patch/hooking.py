"""What happens where the layers begin and where they end: hooks, set to the model's own arguments."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from lsg_patch import compat
from lsg_patch.compat import Signature
from lsg_patch.config import LSGConfig
from lsg_patch.families import Family
from lsg_patch.modules import edges, encoder, stack
from lsg_patch.modules.link import Link
from lsg_patch.plan import Plan
from lsg_patch.undo import Journal


def hook_edges(
    base: nn.Module, family: Family, plan: Plan, config: LSGConfig, journal: Journal
) -> None:
    """Hook what happens where the layers begin and where they end."""
    owner, words = base, f"{family.embeddings}.{family.words}"
    if family.embeds_in_stack:
        owner, words = plan.stack, family.words
    first_word = plan.bos_id if config.mask_first_token else None
    check = stack.CheckInput(config, Signature.of(owner), words, first_word, plan.is_causal)
    hook = _hook_encoder if family.embeds_in_stack else _hook_stack
    hook(base, family, plan, check, journal)


def _hook_stack(
    base: nn.Module, family: Family, plan: Plan, check: stack.CheckInput, journal: Journal
) -> None:
    for name in family.methods_left_out:
        journal.set_attribute(plan.stack, name, stack.leave_out)
    config, num_layers = check.config, plan.num_layers
    if plan.is_causal:
        # a global token, which sees none of a decoder's tokens, cannot say what follows the first one:
        # its output takes that one's place only where nobody sees it
        config = replace(config, pool_with_global=bool(config.mask_first_token))
    carrier = compat.MaskCarrier.of(base, num_layers, plan.is_causal)
    cross_mask = compat.CrossMask.of(base) if plan.is_causal else None
    edges.before(base, stack.EnterModel(check, carrier, cross_mask), journal)
    if plan.rotary is not None:
        if compat.hands_rotation_to_stack(plan.stack):
            edges.before(base, stack.GivePositions(check.call, plan.global_positions), journal)
        if plan.rotary.table is not None and plan.positions is not None:
            # the stack would read as many rows as it has; its layers get theirs with the layout
            journal.before(plan.positions, encoder.first_position, with_kwargs=False)
    tokens = _hook_embeddings(base, family, plan, journal)
    of_stack = Signature.of(plan.stack)
    enter_stack = stack.EnterStack(
        config,
        of_stack,
        tokens,
        plan.rotary,
        family.relative_bias,
        plan.global_positions,
        plan.is_causal,
        # turned values say where they are, all else how far apart two tokens are
        from_text=plan.rotary is not None and not plan.rotary.turns_values(plan.attentions[0]),
    )
    journal.before(plan.stack, enter_stack)
    for_model = not compat.stack_collects_hidden_states(plan.stack)
    journal.after(plan.stack, stack.LeaveStack(of_stack, for_model))
    if for_model:
        edges.after(base, stack.LeaveModel(config, check.call, num_layers), journal)


def _hook_embeddings(
    base: nn.Module, family: Family, plan: Plan, journal: Journal
) -> stack.GlobalTokens | None:
    """Hook the embeddings; returns the global tokens for the stack (None: there are none)."""
    call = Signature.of(plan.embeddings)
    if call.mask in call.names:
        journal.before(plan.embeddings, stack.CompactMask(call))
    if plan.global_rows is None:
        return None
    journal.set_attribute(plan.stack, "lsg_base", Link(base))
    journal.before(base, stack.LinkStack(family.stack), with_kwargs=False)
    projection = getattr(base, family.projection, None) if family.projection else None
    tokens = stack.GlobalTokens(
        family.embeddings,
        family.global_path,
        positions=family.positions if plan.rotary is None else None,
        position_rows=tuple(plan.offset + position for position in plan.global_positions),
        projection=None if projection is None else family.projection,
    )
    journal.after(plan.embeddings, stack.NoteGlobals(tokens, call, family.word_scale))
    if projection is not None:
        journal.after(projection, stack.carry_globals, with_kwargs=False)
    return tokens


def _hook_encoder(
    base: nn.Module, family: Family, plan: Plan, check: stack.CheckInput, journal: Journal
) -> None:
    config, num_layers = check.config, len(plan.attentions)
    # an encoder that embeds its input has a table of positions
    assert plan.positions is not None and family.positions is not None
    takes_shape = compat.takes_shape(plan.positions)
    carrier = compat.MaskCarrier.of_encoder(plan.stack, num_layers)
    enter = encoder.EnterEncoder(check, carrier, family.words, family.positions, takes_shape)
    edges.before(plan.stack, enter, journal)
    journal.before(plan.positions, encoder.first_position, with_kwargs=False)
    journal.after(plan.positions, encoder.no_positions, with_kwargs=False)
    for module in plan.attentions:
        journal.before(module, encoder.GiveLayout(config, Signature.of(module)))
    edges.after(plan.stack, encoder.LeaveEncoder(config, check.call, num_layers), journal)
    if plan.decoder is not None and config.pass_global_tokens_to_decoder:
        journal.before(plan.decoder, encoder.EnterDecoder(config, Signature.of(plan.decoder)))
