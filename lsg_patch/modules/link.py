"""How one module of a model finds another that is not its child."""

from __future__ import annotations

from typing import Any

from torch import nn


class Link:
    """The way to ``module``, which is not stored, moved or counted with the one that has the link.

    In a copy of a whole model it leads to the copy's own module; in a copy of a part (as PEFT's
    modules_to_save make them) to where it led, unless the module is in that part.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> Link:
        return Link(memo.get(id(self.module), self.module))
