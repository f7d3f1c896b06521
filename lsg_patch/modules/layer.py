"""Many rows in a layer: some at a time on a CPU, so that memory is used again and not new.

Between its input and its output a layer makes tensors several times as large. Beyond some size a C
library gives each of them back to the system, and gets new pages for the next one: a third of the
time of a forward, on some machines. What is told apart by sequences runs on parts of a packed batch;
what makes each row by itself, the feed-forward and the projection after the attention, on parts of
any batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lsg_patch import compat
from lsg_patch.attention.compiling import is_compiling
from lsg_patch.modules.arguments import Argument
from lsg_patch.modules.layout import Layout
from lsg_patch.modules.swapped import Swapped, swap_class
from lsg_patch.undo import Journal

# rows whose tensors are kept for the next part, if only just; a longer sequence is a part of its own
ROWS_AT_ONCE = 4096
# rows of a feed-forward, four times as wide, and of a projection, whose tensors are kept
ROWS_BY_THEMSELVES = 1024


@dataclass(frozen=True)
class LayerState:
    """What a swapped layer knows besides what it was: its arguments."""

    hidden: Argument
    mask: Argument


class LSGLayer(Swapped):
    """Mixed into the class of a layer, whose name it keeps: others find layers by it."""

    lsg: LayerState

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives, of a packed batch by itself for each part of its rows."""
        hidden, layout = self.lsg.hidden.get(args, kwargs), self.lsg.mask.get(args, kwargs)
        if not isinstance(layout, Layout) or not layout.batches or hidden.device.type != "cpu":
            return super().forward(*args, **kwargs)
        outputs = []
        for rows, part in layout.parts(ROWS_AT_ONCE):
            own = self.lsg.hidden.put(hidden[:, rows], args, kwargs)
            own_args, own_kwargs = self.lsg.mask.put(part, *own)
            outputs.append(super().forward(*own_args, **own_kwargs))
        return outputs[0] if len(outputs) == 1 else _joined(outputs)

    def feed_forward_chunk(self, hidden: Tensor) -> Tensor:
        """The feed-forward of most families' layers."""
        return some_at_a_time(super().feed_forward_chunk, hidden)  # type: ignore[misc]

    def ff_chunk(self, hidden: Tensor) -> Tensor:
        """The feed-forward of ALBERT's layers."""
        return some_at_a_time(super().ff_chunk, hidden)  # type: ignore[misc]


class LSGRowWise(Swapped):
    """Mixed into the class of a module that makes each row by itself, whose name it keeps."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives, of (B, N, width) each."""
        if kwargs:  # families call it by position
            return super().forward(*args, **kwargs)
        return some_at_a_time(super().forward, *args)


def some_at_a_time(of_rows: Callable[..., Tensor], *given: Tensor) -> Tensor:
    """What ``of_rows`` makes of each row of those ``given``, (B, N, width) each."""
    batch, count, _ = given[0].shape
    parts = -(-batch * count // ROWS_BY_THEMSELVES)
    # for a backward all of it has to be kept anyway
    if is_compiling() or parts <= 1 or given[0].device.type != "cpu" or torch.is_grad_enabled():
        return of_rows(*given)
    out, at = None, 0
    for some in zip(*(x.chunk(parts, dim=1) for x in given), strict=True):
        found = of_rows(*some)
        out = found.new_empty(batch, count, found.shape[2]) if out is None else out
        out[:, at : at + found.shape[1]] = found
        at += found.shape[1]
    assert out is not None
    return out


def _joined(outputs: list[Any]) -> Any:
    """Tensors (1, n, ...) one after the other, also where they are the first of several values."""
    if isinstance(outputs[0], Tensor):
        return torch.cat(outputs, dim=1)
    return tuple(
        torch.cat(values, dim=1) if isinstance(values[0], Tensor) else values[0]
        for values in zip(*outputs, strict=True)
    )


def swap_layer(module: nn.Module, journal: Journal) -> None:
    """Make the layer ``module`` run on some rows at a time."""
    parameters = compat.forward_parameters(module)
    hidden = Argument.of(parameters, parameters[0])
    mask = Argument.of(parameters, *compat.MASK_NAMES)
    swap_class(module, LSGLayer, LayerState(hidden, mask), journal)


def swap_row_wise(module: nn.Module, journal: Journal) -> None:
    """Make ``module``, which makes each row by itself, run on some rows at a time."""
    swap_class(module, LSGRowWise, None, journal)
