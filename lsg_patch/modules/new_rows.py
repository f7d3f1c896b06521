"""A position table of which the new rows train and the old ones cannot.

The new rows are a parameter of their own: an optimizer has no old ones to move, be it by a gradient, by
momentum or by weight decay. State dicts have one table, as ever.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lsg_patch.modules.swapped import ClassSwapped, Swapped, set_class, swapped_class
from lsg_patch.undo import Journal, records_of

NEW_ROWS = "new_rows"


class NewRowsTrain(Swapped):
    """Mixed into the class of a table: the last rows of its weight are those of ``new_rows``."""

    prefix = "NewRows"
    new_rows: nn.Parameter

    @property
    def weight(self) -> Tensor:
        """(n, width), the whole table."""
        weight = self._parameters.get("weight")
        weight = vars(self)["_replicated"] if weight is None else weight
        return torch.cat([weight[: -len(self.new_rows)], self.new_rows])

    @weight.setter
    def weight(self, value: Tensor) -> None:
        """Of a replica (``DataParallel``), which has no parameters."""
        vars(self)["_replicated"] = value

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()
        del destination[prefix + NEW_ROWS]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        rows = state_dict.get(f"{prefix}weight")
        if rows is not None:  # the caller's dictionary is not changed
            state_dict = {**state_dict, prefix + NEW_ROWS: rows[-len(self.new_rows) :]}
        super()._load_from_state_dict(state_dict, prefix, *args)


class RowsSplit(ClassSwapped):
    """The table is one parameter again, with what its new rows learned."""

    def undo(self) -> None:
        own = self.module._parameters
        cast("nn.Parameter", own["weight"]).data = cast("Tensor", self.module.weight).detach()
        super().undo()
        own.pop(NEW_ROWS, None)


def split(tables: list[nn.Embedding], count: int, journal: Journal) -> nn.Parameter:
    """Let only the rows behind the first ``count`` of ``tables``, which share a weight, train.

    Returns:
        The new rows (n - count, width), a parameter.
    """
    new = nn.Parameter(tables[0].weight.detach()[count:].clone())
    for table in tables:
        journal.of(table).record(RowsSplit(table, NewRowsTrain, type(table)))
        table.weight.requires_grad_(False)
        table.register_parameter(NEW_ROWS, new)
        set_class(table, swapped_class(NewRowsTrain, type(table)))
    return new


def join(model: nn.Module) -> None:
    """Take back what ``split`` did to the tables in ``model``."""
    for _, record in records_of(model):
        for change in [x for x in record.changes if isinstance(x, RowsSplit)]:
            change.undo()
            record.changes.remove(change)
