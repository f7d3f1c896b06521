"""Many rows in a layer: some at a time on a CPU, so that memory is used again and not new.

Between its input and its output a layer makes tensors several times as large. Beyond some size a C
library gives each of them back to the system, and gets new pages for the next one: a third of the
time of a forward, on some machines. What is told apart by sequences runs on parts of a packed batch;
the feed-forward, which is told apart by rows, on parts of any batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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
# rows whose feed-forward, four times as wide, is kept
FEED_FORWARD_ROWS = 2048


@dataclass(frozen=True)
class LayerState:
    """What a swapped layer knows besides what it was: its arguments, and what was changed of it."""

    hidden: Argument
    mask: Argument
    journal: Journal = field(repr=False, compare=False)


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
        return _some_at_a_time(super().feed_forward_chunk, hidden)  # type: ignore[misc]

    def ff_chunk(self, hidden: Tensor) -> Tensor:
        """The feed-forward of ALBERT's layers."""
        return _some_at_a_time(super().ff_chunk, hidden)  # type: ignore[misc]


def _some_at_a_time(of_rows: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """What ``of_rows`` makes of each row of ``hidden`` (B, N, width)."""
    batch, count, _ = hidden.shape
    parts = -(-batch * count // FEED_FORWARD_ROWS)
    # for a backward all of it has to be kept anyway
    if parts <= 1 or hidden.device.type != "cpu" or torch.is_grad_enabled() or is_compiling():
        return of_rows(hidden)
    out, at = None, 0
    for part in hidden.chunk(parts, dim=1):
        found = of_rows(part)
        out = found.new_empty(batch, count, found.shape[2]) if out is None else out
        out[:, at : at + part.shape[1]] = found
        at += part.shape[1]
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
    own = Journal()
    journal.record(own)
    parameters = compat.forward_parameters(module)
    hidden = Argument.of(parameters, parameters[0])
    mask = Argument.of(parameters, *compat.MASK_NAMES)
    swap_class(module, LSGLayer, LayerState(hidden, mask, own))
