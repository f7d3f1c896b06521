"""What a backend is asked for: the tokens' part of an LSG attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lsg_patch.attention.bias import RelativeBias
from lsg_patch.attention.geometry import Geometry
from lsg_patch.attention.keys import Keys


class Blocks(NamedTuple):
    """The queries of more than two blocks of tokens, and the keys that they may see.

    Attributes:
        query: (B, H, T, D) of the tokens.
        global_keys, sparse, tokens: keys that all blocks see, and those they see windows of;
            ``sparse`` is None where there is no sparse part.
        dropout_p: of the probabilities.
        scale: of the scores.
        bias: what is added to the scaled scores by distance.
        front: what the global tokens found, (B, H, g, D): it stands before the result, so that a
            backend can write the result behind it at once.
    """

    query: Tensor
    global_keys: Keys
    sparse: Keys | None
    tokens: Keys
    geometry: Geometry
    scale: float
    dropout_p: float = 0.0
    bias: RelativeBias | None = None
    front: Tensor | None = None

    @property
    def num_sparse(self) -> int:
        return 0 if self.sparse is None else self.sparse.key.shape[2]

    @property
    def num_front(self) -> int:
        return 0 if self.front is None else self.front.shape[2]

    def with_front(self, out: Tensor) -> Tensor:
        """``out`` (B, H, T, D) behind ``front``: (B, H, g + T, D)."""
        return out if self.front is None else joined(self.front, out)

    @property
    def needs_grad(self) -> bool:
        """Whether anybody will ask for a gradient."""
        if not torch.is_grad_enabled():
            return False
        sides = [keys for keys in (self.global_keys, self.sparse, self.tokens) if keys is not None]
        inputs = [self.query] + [x for keys in sides for x in (keys.key, keys.value)]
        inputs += [] if self.bias is None else [self.bias.table]
        return any(x.requires_grad for x in inputs)


def joined(front: Tensor, out: Tensor) -> Tensor:
    """``front`` (B, H, g, D) and ``out`` (B, H, T, D) as (B, H, g + T, D), laid out as ``memory_like``."""
    return torch.cat([front.transpose(1, 2), out.transpose(1, 2)], dim=1).transpose(1, 2)


def memory_like(x: Tensor, rows: int) -> Tensor:
    """Memory for (B, H, rows, D), laid out as (B, rows, H, D): joining the heads copies nothing."""
    batch, heads, _, width = x.shape
    return x.new_empty(batch, rows, heads, width).transpose(1, 2)
