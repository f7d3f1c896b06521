"""A packed batch in a layer: some sequences at a time on a CPU, so that memory is used again.

Between its input and its output a layer makes tensors several times as large. Beyond some size a C
library gives each of them back to the system, and gets new pages for the next one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lsg_patch import compat
from lsg_patch.modules.arguments import Argument
from lsg_patch.modules.layout import Layout
from lsg_patch.modules.swapped import Swapped, swap_class
from lsg_patch.undo import Journal

# a longer sequence is a part of its own
ROWS_AT_ONCE = 4096


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


def _joined(outputs: list[Any]) -> Any:
    """Tensors (1, n, ...) one after the other, also where they are the first of several values."""
    if isinstance(outputs[0], Tensor):
        return torch.cat(outputs, dim=1)
    return tuple(
        torch.cat(values, dim=1) if isinstance(values[0], Tensor) else values[0]
        for values in zip(*outputs, strict=True)
    )


def swap_layer(module: nn.Module, journal: Journal) -> None:
    """Make the layer ``module`` run on some rows of a packed batch at a time."""
    parameters = compat.forward_parameters(module)
    hidden = Argument.of(parameters, parameters[0])
    mask = Argument.of(parameters, *compat.MASK_NAMES)
    swap_class(module, LSGLayer, LayerState(hidden, mask), journal)
