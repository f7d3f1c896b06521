"""Where the tokens of an input lie in the layer stack, and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lsg_patch.attention import RelativeBias
from lsg_patch.attention.compiling import at_least_two, is_compiling, is_exporting
from lsg_patch.config import LSGConfig

# by default: the share of a padded batch up to which its real rows are worth taking out
WORTH_PACKING = 0.9


class Batch(NamedTuple):
    """Sequences of a packed stack that are attended to together: as many rows each.

    Attributes:
        sequences: how many, each [global tokens | tokens | padding], one after the other.
        size: the stack's rows of one of them.
        key_mask: (1 or sequences, size - g), as in ``Layout``.
        bias: as in ``Layout``, of these rows.
    """

    sequences: int
    size: int
    key_mask: Tensor | None
    bias: RelativeBias | None = None

    @property
    def rows(self) -> int:
        """Rows of the stack."""
        return self.sequences * self.size


class Layout(NamedTuple):
    """How a batch lies in the stack; the layers receive it in place of a padding mask.

    A row of the stack is [global tokens | the row's tokens from its first real one on | padding];
    in short inputs whose first token is masked, the first global token replaces it.
    Padding on the left is moved to the right: then blocks begin where the text begins, and results do
    not depend on the amount of padding.

    Attributes:
        key_mask: (1 or B, T) over the tokens of the stack, True where one is seen as a key; None:
            all are seen.
        rows: (1 or B, T0): the stack's row that each token of the input is given back from.
        rotation: where positions are rotary, the cosines and sines of the stack's rows, each
            (1 or B, g + T, head size / 2).
        bias: of the scores, in families that have one.
        batches: of a packed stack, which is (1, N, width): what attends together, in order. Then
            ``key_mask`` and ``bias`` are None, each batch has its own. Empty: it is not packed.
    """

    key_mask: Tensor | None
    rows: Tensor
    rotation: tuple[Tensor, Tensor] | None = None
    bias: RelativeBias | None = None
    batches: tuple[Batch, ...] = ()

    @classmethod
    def __torch_function__(cls, *call: Any) -> Any:
        """What torch calls where a layer took it for a mask."""
        raise RuntimeError(
            "a layer in a patched stack is not patched itself: it was put there while the model was. "
            "unpatch_model(model) first, put it there, and patch the model anew"
        )


class Placement(NamedTuple):
    """Where the tokens of an input (B, T0) go.

    Attributes:
        first: (1 or B, 1), each row's first real token.
        tokens: (1 or B, T), the input's token at each position of the stack; at padding positions any
            valid index.
        num_replaced: 1 where a global token replaces the first token, which then has no position.
        turned: whether the order of tokens may differ from the input's.
    """

    first: Tensor
    tokens: Tensor
    num_replaced: int
    turned: bool


def place(mask: Tensor | None, length: int, config: LSGConfig, device: torch.device) -> Placement:
    """Places for inputs of ``length`` tokens with the padding mask (B, length), True for tokens."""
    geometry = config.geometry()
    # beyond two blocks it keeps its place, which the blocks are counted from; a decoder that sees the
    # global tokens sees it as well
    is_short = not is_exporting() and length <= geometry.full_length
    num_replaced = int(
        bool(config.mask_first_token) and is_short and not config.pass_global_tokens_to_decoder
    )
    turned = mask is not None and not _known_to_be_true(mask[:, 0])
    if mask is not None and turned:
        first = mask.int().argmax(dim=1, keepdim=True)
    else:
        first = torch.zeros(1, 1, dtype=torch.long, device=device)
    room = length
    if is_exporting():  # two blocks at least, so that no size is taken for a constant 1
        room = at_least_two(geometry.num_blocks(length)) * geometry.block_size
    slots = torch.arange(room - num_replaced, device=device)
    return Placement(first, _around(slots + first + num_replaced, length), num_replaced, turned)


def _around(x: Tensor, length: int) -> Tensor:
    """``x`` modulo ``length``, as a tensor: ONNX knows no remainder of a size that is not fixed."""
    return x.remainder(torch.full((), length, dtype=x.dtype, device=x.device))


def _known_to_be_true(mask: Tensor) -> bool:
    """Whether all of a mask is True; False where it would take a wait for a device, or a graph of
    this mask alone, to know.
    """
    return mask.device.type == "cpu" and not is_compiling() and bool(mask.all())


def lay_out(
    mask: Tensor | None, length: int, config: LSGConfig, device: torch.device, pool: bool = True
) -> Layout:
    """The layout of inputs of ``length`` tokens with the padding mask (B, length), True for tokens.

    ``pool=False``: each token is given back from its own row, whatever ``config`` says.
    """
    return _layout(mask, length, config, place(mask, length, config, device), pool)


def _layout(
    mask: Tensor | None, length: int, config: LSGConfig, placement: Placement, pool: bool = True
) -> Layout:
    first, tokens, num_replaced, _ = placement
    slots = torch.arange(tokens.shape[1], device=tokens.device)
    hides_first = config.mask_first_token and not num_replaced
    key_mask = None
    if mask is not None or hides_first or is_compiling() or tokens.shape[1] > length:
        key_mask = (slots < length - num_replaced)[None]
        if mask is not None:
            key_mask = key_mask & mask.gather(1, tokens.expand(mask.shape[0], -1))
        if hides_first:
            key_mask = key_mask & (slots > 0)
        if _known_to_be_true(key_mask):
            key_mask = None  # attention without a mask is faster
    position = torch.arange(length, device=tokens.device)[None]
    rows = config.num_global_tokens - num_replaced + _around(position - first, length)
    if pool and config.pool_with_global and config.num_global_tokens:
        # the first global token's output is that of the first real token, and of padding before it
        rows = rows.masked_fill(position <= first, 0)
    return Layout(key_mask, rows)


class Packing(NamedTuple):
    """A batch of which the real tokens alone are in the stack.

    Attributes:
        taken: (N,), the row of the input (B * (g + T0)) at each position of the stack; at padding
            positions any valid index.
        layout: of the stack.
    """

    taken: Tensor
    layout: Layout


def pack(mask: Tensor, config: LSGConfig) -> Packing | None:
    """Each row of the padding mask (B, T0) by itself, from its first real token to its last.

    Rows of as many blocks lie as a batch of their own would, padded to the longest of them. None
    where that is not less than the whole, or by default not much less. A row of padding alone counts
    as one token, which is masked.
    """
    count, length = mask.shape
    first, real = mask.int().argmax(1), mask.sum(1)
    end = torch.where(real > 0, length - mask.int().flip(1).argmax(1), first + 1)
    lengths, counts = torch.stack([end - first, real]).tolist()
    geometry, num_global = config.geometry(), config.num_global_tokens
    alike: dict[int, list[int]] = {}
    for row, own in enumerate(lengths):
        alike.setdefault(geometry.num_blocks(own), []).append(row)
    groups = [(of, max(lengths[row] for row in of)) for of in alike.values()]
    needed = sum(len(of) * (num_global + size) for of, size in groups)
    whole = count * (num_global + length)
    if needed >= (whole if config.unpad else WORTH_PACKING * whole):
        return None
    taken, given_back, batches, start = [], [], [], 0
    position = torch.arange(length, device=mask.device)
    globals_ = torch.arange(num_global, device=mask.device)
    for of, size in groups:
        which = torch.tensor(of, device=mask.device)[:, None]
        begins, ends = first[which], end[which]
        # the batch that these rows would be by themselves, without the padding around them
        own_mask = None
        if any(counts[row] != size for row in of):
            turned = begins + position[:size]
            own_mask = mask[which, turned.clamp(max=length - 1)] & (turned < ends)
        placement = place(own_mask, size, config, mask.device)
        own = _layout(own_mask, size, config, placement)
        tokens = (begins + placement.tokens).clamp(max=length - 1)
        rows = torch.cat([globals_.expand(len(of), -1), num_global + tokens], dim=1)
        taken.append((which * (num_global + length) + rows).flatten())
        nearest = torch.minimum(torch.maximum(position, begins), ends - 1) - begins
        starts = start + rows.shape[1] * torch.arange(len(of), device=mask.device)[:, None]
        given_back.append(starts + own.rows.expand(len(of), -1).gather(1, nearest))
        batches.append(Batch(len(of), rows.shape[1], own.key_mask))
        start += rows.numel()
    in_order = torch.tensor([row for of, _ in groups for row in of], device=mask.device).argsort()
    layout = Layout(None, torch.cat(given_back)[in_order], batches=tuple(batches))
    return Packing(torch.cat(taken), layout)


def enter(
    hidden: Tensor,
    mask: Tensor | None,
    config: LSGConfig,
    rotation: tuple[Tensor, Tensor] | None = None,
    bias: RelativeBias | None = None,
) -> tuple[Tensor, Layout]:
    """``hidden`` (B, g + T0, width), as the embeddings gave it, laid out for the stack.

    So are the ``rotation`` of its rows, (1 or B, g + T0, head size / 2) each, and the positions of
    the ``bias``, (1 or B, g + T0).
    """
    if mask is not None and _known_to_be_true(mask):
        mask = None
    packing = packing_of(mask, config)
    if packing is not None:
        return _enter_packed(hidden, packing, rotation, bias)
    num_global = config.num_global_tokens
    length = hidden.shape[1] - num_global
    placement = place(mask, length, config, hidden.device)
    layout = _layout(mask, length, config, placement)

    def laid_out(x: Tensor) -> Tensor:
        """Of (1 or B, g + T0, n): (1 or B, g + T, n)."""
        tokens = placement.tokens
        if placement.turned:
            globals_ = torch.arange(num_global, device=x.device).expand(tokens.shape[0], -1)
            rows = torch.cat([globals_, num_global + tokens], dim=1)
            return take_rows(x if rows.shape[0] == 1 else x.expand(rows.shape[0], -1, -1), rows)
        if placement.num_replaced:
            x = torch.cat([x[:, :num_global], x[:, num_global + placement.num_replaced :]], dim=1)
        missing = num_global + tokens.shape[1] - x.shape[1]
        # in a graph, too, that is made for sizes that vary: one that fits is no other case
        return F.pad(x, (0, 0, 0, missing)) if is_compiling() or missing else x

    if rotation is not None:
        layout = layout._replace(rotation=(laid_out(rotation[0]), laid_out(rotation[1])))
    if bias is not None and bias.positions is not None:
        positions = laid_out(bias.positions.unsqueeze(-1)).squeeze(-1)
        layout = layout._replace(bias=bias._replace(positions=positions))
    return laid_out(hidden), layout


def _enter_packed(
    hidden: Tensor,
    packing: Packing,
    rotation: tuple[Tensor, Tensor] | None,
    bias: RelativeBias | None,
) -> tuple[Tensor, Layout]:
    """What ``enter`` gives, packed: ``hidden`` is (1, N, width)."""
    taken, layout = packing

    def packed(x: Tensor) -> Tensor:
        """Of (1 or B, g + T0, n): (1, N, n)."""
        if len(x) == 1:
            return x.index_select(1, taken % x.shape[1])
        return x.flatten(0, 1).index_select(0, taken)[None]

    if rotation is not None:
        layout = layout._replace(rotation=(packed(rotation[0]), packed(rotation[1])))
    if bias is not None and bias.positions is not None:
        positions = packed(bias.positions.unsqueeze(-1)).flatten()
        parts = positions.split([batch.rows for batch in layout.batches])
        batches = (
            batch._replace(bias=bias._replace(positions=x.view(batch.sequences, batch.size)))
            for batch, x in zip(layout.batches, parts, strict=True)
        )
        layout = layout._replace(batches=tuple(batches))
    return packed(hidden), layout


def packing_of(mask: Tensor | None, config: LSGConfig) -> Packing | None:
    """How the input is packed, if it is to be."""
    # a graph would keep the lengths of this batch for every other one
    if config.unpad is False or mask is None or is_compiling():
        return None
    # up to two blocks padding, too, has the output that it has unpatched
    if config.unpad is None and mask.shape[1] <= config.geometry().full_length:
        return None
    return pack(mask, config)


def with_globals_in_front(
    tokens: Tensor, mask: Tensor | None, of_globals: tuple[int, ...]
) -> Tensor:
    """Positions (1 or B, g + T0) of all rows, of those of the tokens (1 or B, T0).

    A global token's counts from the first real token of the row: see ``global_positions``.
    """
    first = tokens[:, :1]
    if mask is not None:
        first = tokens.expand(mask.shape[0], -1).gather(1, mask.int().argmax(dim=1, keepdim=True))
    globals_ = first + torch.tensor(of_globals, dtype=tokens.dtype, device=tokens.device)
    return torch.cat([globals_, tokens.expand(first.shape[0], -1)], dim=1)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows (1 or B, n) of ``x`` (B, m, width), as (B, n, width).

    With those of a ``Layout``: what the stack has, in the input's order. Of packed ``x`` (1, N, width).
    """
    if rows.shape[0] == 1:
        return x.index_select(1, rows[0])
    batch, length, width = x.shape
    flat = rows + length * torch.arange(batch, device=x.device)[:, None]
    return x.reshape(batch * length, width).index_select(0, flat.flatten()).view(*rows.shape, width)
