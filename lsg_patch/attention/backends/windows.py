"""The keys that each block sees, as views: nothing is gathered here."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lsg_patch.attention.backends.pieces import Piece
from lsg_patch.attention.bias import BlockBias
from lsg_patch.attention.blocks import Blocks
from lsg_patch.attention.geometry import Run, Window, unfold_windows
from lsg_patch.attention.keys import Keys, additive


class Windows(NamedTuple):
    """What the blocks of a run see: windows of global keys, of sparse ones, and of the tokens."""

    run: Run
    parts: list[tuple[Keys, Window]]

    @property
    def size(self) -> int:
        """Keys that a block sees."""
        return sum(window.size for _, window in self.parts)

    def key(self, piece: Piece) -> list[Tensor]:
        """The keys of a piece of the run, in parts (heads, blocks, size, D)."""
        return [piece.window(keys.key, window, self.run) for keys, window in self.parts]

    def value(self, piece: Piece) -> list[Tensor]:
        """Their values."""
        return [piece.window(keys.value, window, self.run) for keys, window in self.parts]


def windows(blocks: Blocks, run: Run) -> Windows:
    """What the blocks of ``run`` see, whose windows do not leave the sequence."""
    global_keys, sparse, tokens = blocks.global_keys, blocks.sparse, blocks.tokens
    parts = [(global_keys, Window(0, global_keys.key.shape[2], 0))]
    if sparse is not None:
        parts += [(sparse, window) for window in run.sparse]
    return Windows(run, [*parts, (tokens, run.local)])


def padding(blocks: Blocks, run: Run) -> Tensor:
    """What keeps the queries of ``run`` from keys that are not seen: (B, 1 or H, blocks, 1, keys)."""
    masks = unfolded(blocks, run, "mask")
    heads = max(mask.shape[1] for mask in masks)
    seen = torch.cat([mask.expand(-1, heads, -1, -1) for mask in masks], dim=-1)
    return additive(seen.unsqueeze(-2), blocks.query.dtype)


def unfolded(blocks: Blocks, run: Run, name: str) -> list[Tensor]:
    """Views (B, 1 or H, blocks, size, ...) of the ``name`` of all keys that the blocks of ``run`` see."""
    global_keys, sparse, tokens = blocks.global_keys, blocks.sparse, blocks.tokens
    dim = 2
    shared = getattr(global_keys, name).unsqueeze(dim)
    found = [shared.expand(*shared.shape[:dim], run.blocks, *shared.shape[dim + 1 :])]
    if sparse is not None and run.sparse:
        found += unfold_windows(getattr(sparse, name), run.sparse, run.blocks, dim, run.first)
    found += unfold_windows(getattr(tokens, name), (run.local,), run.blocks, dim, run.first)
    return found


def runs(blocks: Blocks) -> Iterator[tuple[Run, Windows, Tensor | None]]:
    """Blocks whose windows are cut off alike, what they see, and its ``padding`` if there is any."""
    of_globals, of_sparse, of_tokens = (
        _hidden(keys) for keys in (blocks.global_keys, blocks.sparse, blocks.tokens)
    )
    geometry, first = blocks.geometry, 0
    if of_tokens:  # most often the one token that a global token replaces
        first = _seen_by_none(blocks.tokens.mask[:, :, : geometry.block_size - 1])
    for run in geometry.runs(blocks.query.shape[2], blocks.num_sparse, first):
        spans = [(of_sparse, window) for window in run.sparse] + [(of_tokens, run.local)]
        is_padded = bool(of_globals) or any(_is_any_in(run.span(w), at) for at, w in spans)
        yield run, windows(blocks, run), padding(blocks, run) if is_padded else None


def _hidden(keys: Keys | None) -> list[int]:
    """Where keys are that some row or head does not see, in order."""
    if keys is None or bool(keys.mask.all()):
        return []
    seen = keys.mask.flatten(0, 1).all(0)
    found: list[int] = seen.logical_not().nonzero().flatten().tolist()
    return found


def _seen_by_none(mask: Tensor) -> int:
    """Tokens of ``mask`` (B, 1, n) before the first one that is seen in some row."""
    seen: list[bool] = mask.flatten(0, 1).any(0).tolist()
    return [*seen, True].index(True)


def _is_any_in(span: range, places: list[int]) -> bool:
    """Whether one of the ``places``, which are in order, is in ``span``."""
    next_one = bisect_left(places, span.start)
    return next_one < len(places) and places[next_one] < span.stop


def places(blocks: Blocks, run: Run) -> tuple[list[Tensor], BlockBias | None]:
    """How far the keys that a block sees stand behind its first query, and the bias of it.

    The places are in the parts of ``unfolded``, each (1 or B, 1 or H, 1 or blocks, size): what is
    the same for all blocks is there once.
    """
    bias, sparse, geometry = blocks.bias, blocks.sparse, blocks.geometry
    if bias is None:
        return [], None
    of_globals = bias.of_globals(blocks.global_keys.key.shape[2])
    device = of_globals.device
    block = torch.arange(run.first, run.first + run.blocks, device=device)[:, None]
    start = geometry.block_size * block
    found = [of_globals.unsqueeze(2) - start]
    if sparse is not None and sparse.positions is not None and run.sparse:
        at = unfold_windows(sparse.positions, run.sparse, run.blocks, 2, run.first)
        found += [x - start for x in at]
    elif sparse is not None:
        for window in run.sparse:
            index = torch.arange(window.start, window.start + window.size, device=device)
            found.append(geometry.run_positions(index)[None, None, None])
    token = torch.arange(run.local.start, run.local.start + run.local.size, device=device)
    return [*found, token[None, None, None]], bias.of_blocks(run.queries)


def causal(run: Run, columns: int, like: Tensor) -> Tensor:
    """What keeps queries from the keys after them in their own block, whose keys come last."""
    seen = torch.ones(run.queries, columns, dtype=torch.bool, device=like.device)
    own = min(run.queries, run.local.size)
    seen[:, columns - own :].tril_(own - run.queries)
    return additive(seen, like.dtype)
