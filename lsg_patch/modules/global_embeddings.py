"""The global tokens: a trainable table, and what it holds at first."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# the reference spreads its global tokens over so many positions
REFERENCE_ROWS = 512


class GlobalEmbeddings(nn.Module):
    """``weight`` (num_global_tokens, width): the embeddings of the global tokens.

    A longer table, as published checkpoints have it, is read by its first rows.
    """

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(rows)

    def forward(self, embedded: Tensor) -> Tensor:
        """(B, num_global_tokens, width), for tokens ``embedded`` (B, T, any width)."""
        return self.weight.expand(embedded.shape[0], -1, -1)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.weight.shape))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        name = prefix + "weight"
        rows = state_dict.get(name)
        if isinstance(rows, Tensor) and rows.shape[1:] == self.weight.shape[1:]:
            if len(rows) > len(self.weight):
                logger.warning(
                    "only the first %d of %d global tokens are loaded: the model is patched with "
                    "num_global_tokens=%d",
                    len(self.weight),
                    len(rows),
                    len(self.weight),
                )
            # the caller's dictionary is not changed
            state_dict = {**state_dict, name: rows[: len(self.weight)]}
        super()._load_from_state_dict(state_dict, prefix, *args)


def strided_positions(
    num_positions: int, stride: int, device: torch.device | None = None
) -> Tensor:
    """The order in which global tokens take the positions of a table, far apart from each other.

    Of a table of more than 512 positions every ``num_positions // 512``-th is taken, 512 in all.
    With ``s`` the stride counted in these: 0, s, 2s, ..., then 1, 1 + s, ... Defined for every
    number of positions and every stride (the reference fails for some of them).
    """
    every = max(1, num_positions // REFERENCE_ROWS)
    positions = torch.arange(min(num_positions // every, REFERENCE_ROWS), device=device)
    step = max(1, stride // every)
    return every * positions[torch.sort(positions % step, stable=True).indices]


def global_positions(
    num_positions: int, stride: int, count: int, device: torch.device | None = None
) -> Tensor:
    """The positions of ``count`` global tokens: the first 0, the others ``stride`` apart.

    Where a table's rows are added to words, they are those of the table that the model has when it
    is patched, and say what the global tokens are at first. Where scores depend on the distance of
    two tokens, global tokens have places among them: there they are positions of the patched model's
    length, so that they follow from the settings alone, and each counts from the row's first real
    token, which the first global token replaces. The tokens keep the positions that they
    have unpatched.
    """
    order = strided_positions(num_positions, stride, device)
    return order[torch.arange(count, device=device) % len(order)]


def initial_rows(
    words: Tensor,
    positions: Tensor | None,
    rest: Tensor | None,
    *,
    num_global_tokens: int,
    stride: int,
    bos_id: int,
    mask_id: int | None,
    word_scale: float = 1.0,
    random_init: bool = False,
    seed: int | None = None,
) -> Tensor:
    """What the global tokens are before any training: (num_global_tokens, width).

    The first is the cls/bos token at position 0, so that it can replace the first token of an
    input; the others are mask tokens at positions spread by ``stride``, or with ``random_init`` drawn
    from a normal distribution of the mean and the covariance of ``words``.

    Args:
        words: (vocabulary, width).
        positions: (n, width), the rows of the table from position 0 on; None: none are added.
        rest: (width,), what a first token has besides: the first token type, where there are such.
        word_scale: what a word is multiplied with before its position is added.
    """
    first, others = words[bos_id][None], num_global_tokens - 1
    if random_init:
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
        noise = torch.randn(others, len(words), generator=generator).to(words.device)
        mean = words.float().mean(0)
        # a product with the centred table has the table's covariance, of whatever rank it is
        drawn = mean + noise @ (words.float() - mean) / max(1, len(words) - 1) ** 0.5
        word = torch.cat([first, drawn.to(words.dtype)])
    elif others:
        word = torch.cat([first, words[mask_id].expand(others, -1)])
    else:
        word = first
    rows = word_scale * word
    if positions is not None:
        taken = global_positions(len(positions), stride, num_global_tokens, positions.device)
        rows = rows + positions[taken]
    return rows if rest is None else rows + rest
