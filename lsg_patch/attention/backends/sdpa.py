"""PyTorch's own attention over the windows of keys, gathered block by block."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lsg_patch.attention.backends import products
from lsg_patch.attention.backends.pieces import Piece, cache_bytes, pieces, runs
from lsg_patch.attention.blocks import Blocks
from lsg_patch.attention.compiling import is_compiling, keeps_operations
from lsg_patch.attention.geometry import Run

# products of whole matrices need a fast library; with it, training and inference have the same bits
HAS_BLAS = torch.backends.mkl.is_available()


def block_attention(blocks: Blocks) -> Tensor:
    """LSG attention of the tokens' queries, after the global output: (B, H, g + T, D), linear in T."""
    if blocks.query.device.type == "cpu" and _runs_as_operation(blocks):
        return products.as_operation(blocks)
    if blocks.query.device.type != "cpu" or is_compiling():
        return _at_once(blocks)
    # a checkpoint runs the forward without a gradient and then with one: dropout is to be the same
    trains = blocks.needs_grad or blocks.dropout_p > 0
    by_products = trains or HAS_BLAS or blocks.geometry.is_causal
    if by_products and products.can_run(blocks):
        return products.block_attention(blocks)
    if blocks.needs_grad:
        return blocks.joined(*(_attend(run).flatten(2, 3) for run in runs(blocks)))
    out, tokens_out = blocks.new_output()
    for piece in pieces(blocks, cache_bytes()):
        piece.part(tokens_out).copy_(_attend(piece))
    return out


def _runs_as_operation(blocks: Blocks) -> bool:
    """Whether compiled code calls the products that run uncompiled: faster than what inductor makes."""
    if not keeps_operations() or blocks.needs_grad or blocks.dropout_p > 0:
        return False
    return HAS_BLAS and products.can_run(blocks)


def _at_once(blocks: Blocks) -> Tensor:
    """All blocks in one call, whatever is hidden, with windows that leave the sequence."""
    geometry, length = blocks.geometry, blocks.query.shape[2]
    num_blocks, size = geometry.num_blocks(length), geometry.block_size
    padded = blocks._replace(query=F.pad(blocks.query, (0, 0, 0, num_blocks * size - length)))
    run = Run(0, num_blocks, size, geometry.local_window, geometry.sparse_windows)
    out = _attend(Piece.whole(padded, run))
    return blocks.joined(out.flatten(2, 3)[:, :, :length])


def _attend(piece: Piece) -> Tensor:
    """The output of a piece, (rows, heads, blocks, b, D)."""
    blocks, shape = piece.blocks, piece.shape
    is_single = not is_compiling() and piece.run.num_blocks == 1

    def merged(x: Tensor) -> Tensor:
        """(rows, heads, blocks, ...) in the four dimensions of a fused attention."""
        return x.squeeze(2) if is_single else x.flatten(0, 1)

    query = merged(piece.query)
    key, value = (merged(_joined(piece.windows(name))) for name in ("key", "value"))
    added = piece.added()
    if added is not None:
        added = merged(added if is_single else added.expand(*shape[:2], -1, -1, -1))
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=added, dropout_p=blocks.dropout_p, scale=blocks.scale
    )
    return out.view(*shape, out.shape[-1])


def _joined(parts: list[Tensor]) -> Tensor:
    """``parts`` (rows, heads, blocks, size, D) side by side: one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)
