"""The input of a backend: the tokens' queries and the keys that they attend to."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lsg_patch.attention.bias import RelativeBias
from lsg_patch.attention.geometry import Geometry


class Keys(NamedTuple):
    """``key`` and ``value`` (B, H, n, D); ``mask`` (B, 1 or H, n), True where a key is seen.

    ``positions`` (1 or B, 1 or H, n) of the keys among the tokens, where a bias needs them and they do
    not follow from the index.
    """

    key: Tensor
    value: Tensor
    mask: Tensor
    positions: Tensor | None = None

    def part(self, rows: slice, heads: slice) -> Keys:
        """The keys of these rows of the batch and these heads."""
        return Keys(*(None if x is None else _part(x, rows, heads) for x in self))  # type: ignore[arg-type]


class Blocks(NamedTuple):
    """The queries of more than two blocks of tokens, and the keys that they may see.

    Attributes:
        query: (B, H, T, D) of the tokens.
        global_keys: keys that all blocks see.
        sparse, tokens: keys that they see windows of; ``sparse`` is None without a sparse part.
        scale: of the scores.
        dropout_p: of the probabilities.
        bias: what is added to the scaled scores by distance.
        global_output: the output of the global tokens, (B, H, g, D), which precedes the blocks'.
    """

    query: Tensor
    global_keys: Keys
    sparse: Keys | None
    tokens: Keys
    geometry: Geometry
    scale: float
    dropout_p: float = 0.0
    bias: RelativeBias | None = None
    global_output: Tensor | None = None

    @property
    def num_global(self) -> int:
        """Rows of ``global_output``."""
        return 0 if self.global_output is None else self.global_output.shape[2]

    @property
    def tensors(self) -> list[Tensor | None]:
        """The queries, then keys and values: global, sparse (None where there are none), tokens."""
        sparse = (None, None) if self.sparse is None else self.sparse[:2]
        return [self.query, *self.global_keys[:2], *sparse, *self.tokens[:2]]

    def with_tensors(self, *tensors: Tensor) -> Blocks:
        """The same with other ``tensors``, in the order of these."""
        query, global_key, global_value, key, value, token_key, token_value = tensors
        return self._replace(
            query=query,
            global_keys=self.global_keys._replace(key=global_key, value=global_value),
            sparse=self.sparse and self.sparse._replace(key=key, value=value),
            tokens=self.tokens._replace(key=token_key, value=token_value),
        )

    @property
    def needs_grad(self) -> bool:
        """Whether a gradient may be computed."""
        inputs = [*self.tensors, None if self.bias is None else self.bias.table]
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)

    def part(self, rows: slice, heads: slice) -> Blocks:
        """The same for these rows of the batch and these heads, without ``global_output``."""
        return self._replace(
            query=self.query[rows, heads],
            global_keys=self.global_keys.part(rows, heads),
            sparse=self.sparse and self.sparse.part(rows, heads),
            tokens=self.tokens.part(rows, heads),
            bias=self.bias and self.bias.part(rows, heads),
            global_output=None,
        )

    def joined(self, *outputs: Tensor) -> Tensor:
        """``global_output`` and the blocks' ``outputs`` (B, H, n, D), one after the other."""
        return joined(*(() if self.global_output is None else (self.global_output,)), *outputs)

    def new_output(self) -> tuple[Tensor, Tensor]:
        """Memory for the output (B, H, g + T, D), with ``global_output`` in it; the tokens' rows of it."""
        out = memory_like(self.query, self.num_global + self.query.shape[2])
        if self.global_output is not None:
            out[:, :, : self.num_global] = self.global_output
        return out, out[:, :, self.num_global :]


def joined(*outputs: Tensor) -> Tensor:
    """``outputs`` (B, H, n, D) one after the other along n, laid out as ``memory_like``."""
    return torch.cat([x.transpose(1, 2) for x in outputs], dim=1).transpose(1, 2)


def memory_like(x: Tensor, length: int) -> Tensor:
    """Memory for (B, H, length, D), laid out as (B, length, H, D): joining the heads copies nothing."""
    batch, heads, _, width = x.shape
    return x.new_empty(batch, length, heads, width).transpose(1, 2)


def joined_masks(masks: list[Tensor]) -> Tensor:
    """``masks`` (B, 1 or H, m, n) one after the other along n, for each head where one of them is."""
    heads = max(mask.shape[1] for mask in masks)
    return torch.cat([mask.expand(-1, heads, -1, -1) for mask in masks], dim=-1)


def additive(mask: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """A boolean mask as what is added to scores: ``bias`` (or 0) where True, a penalty elsewhere.

    It is half of the least finite number: a row in which nothing is seen then stays finite, where the
    least number itself would overflow to -inf and its softmax to NaN. Scores of float16 may be greater
    than that, so there it is -inf, but in rows in which nothing is seen: these see everything.
    """
    hidden, penalty = ~mask, torch.finfo(dtype).min / 2
    if dtype == torch.float16:
        hidden, penalty = hidden & mask.any(-1, keepdim=True), -math.inf
    if bias is not None:
        return bias.masked_fill(hidden, penalty)
    return torch.zeros((), dtype=dtype, device=mask.device).masked_fill(hidden, penalty)


def _part(x: Tensor, rows: slice, heads: slice) -> Tensor:
    """These rows and heads of ``x`` (1 or B, 1 or H, ...), where it has more than one."""
    everything = slice(None)
    return x[rows if x.shape[0] > 1 else everything, heads if x.shape[1] > 1 else everything]
