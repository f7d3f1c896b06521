"""An oracle for attention that knows positions by turning: complex numbers, every pair of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import lsg_patch
from lsg_patch.families import FAMILIES
from lsg_patch.modules.global_embeddings import strided_positions
from tests.models import attentions, ids_like, right_padded, run

LEFT = torch.tensor([[1] * 30, [0] * 8 + [1] * 22])


def turned(x: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """``x`` (H, N, D): pair ``i`` of row ``n`` times exp(i * position * 10000 ** (-2i / D))."""
    size = x.shape[-1]
    pairs = x.unflatten(-1, (size // 2, 2) if interleaved else (2, size // 2)).double()
    if not interleaved:
        pairs = pairs.transpose(-1, -2)
    frequencies = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = positions.double()[:, None] * frequencies
    out = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    )
    return out.flatten(-2) if interleaved else out.transpose(-1, -2).flatten(-2)


def check_turned_attention(
    model: Any, family: str, mask: Tensor | None, num_global: int, turns_values: bool = False
) -> None:
    """The first layer's attention in a short input, row by row, against full attention.

    A token has its place in the input as its position, padding on the left included; a global token
    has its own, counted from the text's beginning.
    """
    given = right_padded(30, 30) if mask is None else mask
    seen: dict[str, Any] = {}
    attention = attentions(model, family)[0]

    def watch(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen["hidden"] = args[0] if args else kwargs["hidden_states"]
        seen["context"] = output[0]

    handle = attention.register_forward_hook(watch, with_kwargs=True)
    run(model, ids_like(given, family), mask)
    handle.remove()
    config = lsg_patch.get_config(model)
    order = strided_positions(config.max_position_embeddings, config.global_positional_stride)
    heads = attention.num_attention_heads
    interleaved = FAMILIES[family].rotary.interleaved  # type: ignore[union-attr]
    for row, (hidden, context) in enumerate(zip(seen["hidden"], seen["context"], strict=True)):
        first = int(given[row].argmax())
        length = int(given[row].sum())
        hidden, context = (x[: num_global + length] for x in (hidden, context))
        positions = torch.cat([first + order[:num_global], first + torch.arange(length)])
        query, key, value = (
            getattr(attention, name)(hidden).unflatten(-1, (heads, -1)).transpose(0, 1).double()
            for name in ("query", "key", "value")
        )

        def oracle(places: Tensor, q: Tensor = query, k: Tensor = key, v: Tensor = value) -> Tensor:
            q, k = (turned(x, places, interleaved) for x in (q, k))
            v = turned(v, places, interleaved) if turns_values else v
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            return (scores.softmax(-1) @ v).transpose(0, 1).flatten(-2)

        torch.testing.assert_close(context.double(), oracle(positions), rtol=0, atol=1e-5)
        shifted = oracle(torch.arange(num_global + length))
        assert (shifted - context)[num_global:].abs().max() > 1e-2, "a shift would be seen"


def check_left_padding(model: Any, family: str, sparsity_type: str, unpad: bool) -> None:
    """Beyond two blocks, the text alone and with 37 tokens of padding before it: the same numbers."""
    lsg_patch.patch_model(
        model,
        block_size=16,
        sparse_block_size=16,
        sparsity_type=sparsity_type,
        max_position_embeddings=512,
        unpad=unpad,
    )
    ids = ids_like(right_padded(150, 150), family)
    mask = torch.tensor([[0] * 37 + [1] * 150, [1] * 187])
    padded = ids_like(mask, family, seed=2)
    padded[0, 37:] = ids[0]
    alone = run(model, ids, None)["last_hidden_state"][0]
    found = run(model, padded, mask)["last_hidden_state"][0, 37:]
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-4)
