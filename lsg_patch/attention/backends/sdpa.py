"""PyTorch's own attention over the windows of keys, gathered block by block."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lsg_patch.attention.backends import products
from lsg_patch.attention.backends.pieces import Piece, cache_bytes, pieces, runs
from lsg_patch.attention.blocks import Blocks
from lsg_patch.attention.compiling import is_compiling

# whose products of whole matrices are faster than the small tiles of the fused attention
HAS_BLAS = torch.backends.mkl.is_available()


def block_attention(blocks: Blocks) -> Tensor:
    """LSG attention of the tokens' queries, after the global output: (B, H, g + T, D), linear in T."""
    if blocks.query.device.type != "cpu" or is_compiling():
        return _at_once(blocks)
    if products.can_run(blocks) and (blocks.needs_grad or HAS_BLAS):
        return products.block_attention(blocks)
    if blocks.needs_grad:
        return blocks.joined(*(_attend(run).flatten(2, 3) for run in runs(blocks)))
    out, tokens_out = blocks.new_output()
    for piece in pieces(blocks, cache_bytes()):
        piece.queries(tokens_out).copy_(_attend(piece))
    return out


def _at_once(blocks: Blocks) -> Tensor:
    """All blocks in one call, whatever is hidden."""
    geometry, length = blocks.geometry, blocks.query.shape[2]
    missing = geometry.num_blocks(length) * geometry.block_size - length
    padded = blocks._replace(query=F.pad(blocks.query, (0, 0, 0, missing)))
    out = _attend(Piece.whole(padded, geometry.whole(length)))
    return blocks.joined(out.flatten(2, 3)[:, :, :length])


def _attend(piece: Piece) -> Tensor:
    """The output of a piece, (rows, heads, blocks, b, D)."""
    blocks, shape = piece.blocks, piece.shape
    is_single = not is_compiling() and piece.run.num_blocks == 1

    def merged(x: Tensor) -> Tensor:
        """(rows, heads, blocks, ...) in the four dimensions of a fused attention."""
        return x.squeeze(2) if is_single else x.flatten(0, 1)

    key, value = (torch.cat(piece.windows(name), dim=3) for name in ("key", "value"))
    added = piece.added()
    if added is not None and not is_single:
        added = added.expand(*shape[:2], -1, -1, -1)
    out = F.scaled_dot_product_attention(
        merged(piece.queries(blocks.query)),
        merged(key),
        merged(value),
        attn_mask=None if added is None else merged(added),
        dropout_p=blocks.dropout_p,
        scale=blocks.scale,
    )
    return out.view(*shape, -1)
