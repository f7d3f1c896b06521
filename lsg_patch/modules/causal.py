"""What a decoder's layer stack has of its own: steps, of tokens that see what is before them.

A decoder reads its input in steps: T tokens, after P whose keys and values are in a cache. Global
tokens see only each other, so they are the same at every step: they are prepended to the tokens of
each step and are not cached. The first step is laid out like an encoder's input; at later steps
tokens keep their places and see everything before them. Padding may be anywhere; the mask is over
all P + T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lsg_patch.compat import Args, KeyCache, Kwargs
from lsg_patch.config import LSGConfig
from lsg_patch.modules.layout import Layout, lay_out, take_rows


def lay_out_step(
    mask: Tensor | None, length: int, config: LSGConfig, device: torch.device
) -> Layout:
    """The layout of the last ``length`` of the tokens that the padding mask (B, P + T) is over."""
    if mask is None or mask.shape[1] == length:
        return lay_out(mask, length, config, device)
    if config.mask_first_token:
        first = mask.int().argmax(dim=1, keepdim=True)
        mask = mask & (torch.arange(mask.shape[1], device=device) != first)
    return Layout(mask, config.num_global_tokens + torch.arange(length, device=device)[None])


def change_heads(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """``x`` (B, H, N, D) with ``change`` applied to its rows (B, N, H * D)."""
    rows = change(x.transpose(1, 2).flatten(2))
    return rows.view(*rows.shape[:2], x.shape[1], x.shape[3]).transpose(1, 2)


def with_earlier_keys(
    attention: Any,
    cache: KeyCache,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    num_global: int,
    args: Args,
    kwargs: Kwargs,
) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Of keys and values (B, H, g + T, D) those to attend to (B, H, g + P + T, D).

    And what the module is to return besides. A cache holds those of the input's tokens, in the input's
    order, as the unpatched model's does.
    """
    if cache.given(args, kwargs) is None and not cache.is_tuple:
        return key, value, ()

    def in_order(x: Tensor) -> Tensor:
        return change_heads(x, lambda states: take_rows(states, layout.rows))

    keys, values, returned = cache.extend(attention, in_order(key), in_order(value), args, kwargs)
    own = key.shape[2] - num_global
    seen = own if layout.key_mask is None else layout.key_mask.shape[1]
    if seen == own:
        return key, value, returned  # the first step: nothing but its own tokens, laid out
    key, value = (
        torch.cat([x[:, :, :num_global], of_all[:, :, :seen]], dim=2)
        for x, of_all in ((key, keys), (value, values))
    )
    return key, value, returned
