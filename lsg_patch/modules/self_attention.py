"""A self-attention module that attends by LSG, made of one that attends to everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lsg_patch import compat
from lsg_patch.attention import draw_projections, lsg_attention, projection_shapes
from lsg_patch.attention.rotary import rotate
from lsg_patch.compat import Args, KeyCache, Kwargs, Signature
from lsg_patch.config import LSGConfig
from lsg_patch.families import AttentionNames, Family, Rotary
from lsg_patch.modules.causal import with_earlier_keys
from lsg_patch.modules.layout import Batch, Layout
from lsg_patch.modules.swapped import Swapped, swap_class
from lsg_patch.offloading import device_of
from lsg_patch.undo import Journal


@dataclass(frozen=True)
class AttentionState:
    """What a swapped module knows besides what it was: the settings, its family, its arguments.

    ``outputs`` is how many values it returns; ``rounds`` the number of its projections for lsh;
    ``cache`` where a decoder's module has earlier keys from (None: it is no decoder's).
    """

    config: LSGConfig
    names: AttentionNames
    output: Callable[[Any, Tensor, Tensor], Tensor]
    call: Signature
    outputs: int
    rounds: int
    rotary: Rotary | None
    cache: KeyCache | None


class LSGSelfAttention(Swapped):
    """Mixed into the class of a self-attention module; its projections are the module's own."""

    prefix = "LSG"
    lsg: AttentionState

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Hidden states (B, num_global_tokens + T, width), and the stack's ``Layout`` as the mask.

        Returns what the module gives, (B, num_global_tokens + T, width), and None for all else but
        the keys and values that a decoder keeps.
        """
        lsg = self.lsg
        query, key, value, choose_by, layout = self.projected(args, kwargs)
        cached: tuple[Any, ...] = ()
        if lsg.cache is not None:
            num_global = lsg.config.num_global_tokens
            key, value, cached = with_earlier_keys(
                self, lsg.cache, key, value, layout, num_global, args, kwargs
            )
        context = self.attend(layout, query, key, value, choose_by)
        output = lsg.output(self, lsg.call.get(lsg.call.names[0], args, kwargs), context)
        return (output,) + (None,) * (lsg.outputs - 1) + cached

    def projected(
        self, args: Args, kwargs: Kwargs
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Layout]:
        """Query, key, value (B, H, N, D) of a call, what tokens are chosen by, and the layout."""
        lsg, names, call = self.lsg, self.lsg.names, self.lsg.call
        hidden, layout = (call.get(name, args, kwargs) for name in (call.names[0], call.mask))
        if not isinstance(layout, Layout):
            raise RuntimeError(
                f"{type(self).__name__} runs inside its model only: the layer stack lays its input "
                "out. Call the model, or unpatch it to use a layer alone"
            )
        heads = getattr(self, names.heads)
        projected = [getattr(self, name)(hidden) for name in (names.query, names.key, names.value)]
        query, key, value = (
            x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(1, 2) for x in projected
        )
        choose_by = None
        if lsg.rotary is not None and layout.rotation is not None:
            # a turned key's length and direction follow from its place, and rounding
            choose_by = key
            query = rotate(query, layout.rotation, lsg.rotary.interleaved)
            key = rotate(key, layout.rotation, lsg.rotary.interleaved)
            if lsg.rotary.turns_values(self):
                value = rotate(value, layout.rotation, lsg.rotary.interleaved)
        return query, key, value, choose_by, layout

    def attend(
        self,
        layout: Layout | Batch,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        choose_by: Tensor | None = None,
    ) -> Tensor:
        """The joined heads (B, N, H * D) of (B, H, N, D)."""
        if isinstance(layout, Layout) and layout.batches:
            given = (query, key, value, choose_by)
            return self._attend_packed(layout.batches, *(x for x in given if x is not None))
        lsg, config = self.lsg, self.lsg.config
        context = lsg_attention(
            query,
            key,
            value,
            layout.key_mask,
            block_size=config.block_size,
            sparse_block_size=config.sparse_block_size,
            sparsity_factor=config.sparsity_factor,
            sparsity_type=config.sparsity_type,
            num_global_tokens=config.num_global_tokens,
            is_causal=lsg.cache is not None,
            lsh_num_pre_rounds=config.lsh_num_pre_rounds,
            lsh_projections=[getattr(self, _projection_name(i)) for i in range(lsg.rounds)],
            choose_by=choose_by,
            dropout_p=self._dropout_p(),
            relative_bias=layout.bias,
            backend=config.backend,
        )
        return context.transpose(1, 2).flatten(2)

    def _attend_packed(self, batches: tuple[Batch, ...], *tensors: Tensor) -> Tensor:
        """The same of (1, H, N, D), the concatenation of the ``batches``."""
        sizes = [batch.rows for batch in batches]
        contexts = []
        for batch, *heads in zip(batches, *(x.split(sizes, dim=2) for x in tensors), strict=True):
            own = (x[0].unflatten(1, (batch.sequences, batch.size)).transpose(0, 1) for x in heads)
            contexts.append(self.attend(batch, *own).flatten(0, 1))
        return torch.cat(contexts)[None]

    def _dropout_p(self) -> float:
        if not self.training:
            return 0.0
        given = self.lsg.config.attention_probs_dropout_prob
        own = getattr(self, self.lsg.names.dropout)
        return float(given if given is not None else getattr(own, "p", own))


def swap_attention(
    module: nn.Module,
    config: LSGConfig,
    family: Family,
    seed: int,
    journal: Journal,
    is_causal: bool = False,
) -> None:
    """Make ``module`` attend by LSG; if ``is_causal``, each token to those before it only."""
    names = family.names
    shapes: list[tuple[int, int, int]] = []
    if config.sparsity_type == "lsh":
        heads = getattr(module, names.heads)
        query = getattr(module, names.query)
        # what torch.fx made of a linear layer knows no sizes
        width = getattr(query, "out_features", None) or query.weight.shape[0]
        head_size = width // heads
        shapes = projection_shapes(config.geometry(), heads, head_size, config.lsh_num_pre_rounds)
    floating = (
        x.dtype for x in module.parameters() if x.is_floating_point() and x.element_size() > 1
    )
    device, dtype = device_of(module), next(floating, torch.float32)
    for i, projection in enumerate(draw_projections(shapes, seed)):
        # buffers, so that they move with the module and reach its replicas
        journal.add(module, _projection_name(i), projection.to(device, dtype))
    state = AttentionState(
        config,
        names,
        family.output,
        Signature.of(module),
        compat.attention_outputs(module),
        len(shapes),
        family.rotary,
        KeyCache.of(module) if is_causal else None,
    )
    swap_class(module, LSGSelfAttention, state, journal)


def _projection_name(index: int) -> str:
    return f"lsh_projection_{index}"
