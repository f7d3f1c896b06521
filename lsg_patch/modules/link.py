"""How a module is found by another that is not its parent, and what holds it or its parameter."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class Link:
    """The way to ``module``, which is not stored, moved or counted with the one that has the link.

    In a copy of a whole model it leads to the copy's own module; in a copy of a part (as PEFT's
    modules_to_save make them) to where it led, unless the module is in that part.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> Link:
        return Link(memo.get(id(self.module), self.module))


def others_with(values: Sequence[Any], known: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules besides the ``known`` ones, wherever they are, of which one of ``values`` is a
    parameter or a child.
    """
    if not _holders(values, known):
        return []
    gc.collect()  # they may be gone
    return _holders(values, known)


_CHILDREN = (nn.Module, Tensor, type(None))


def _holders(values: Sequence[Any], known: Sequence[nn.Module]) -> list[nn.Module]:
    ours = {id(x) for module in known for x in (module._parameters, module._modules)}
    # dictionaries of modules hold nothing else; to ask who has another, globals() say, takes long
    held = {
        id(x): x
        for x in gc.get_referrers(*values)
        if issubclass(type(x), dict)  # older torch has ordered ones
        and id(x) not in ours
        and all(issubclass(type(held), _CHILDREN) for held in list(x.values()))
    }
    if not held:
        return []
    # a module refers to such a dictionary itself (Python 3.13), or by its attributes
    owners = gc.get_referrers(*held.values())
    named = ("_parameters", "_modules")
    attributes = [x for x in owners if type(x) is dict and any(id(x.get(n)) in held for n in named)]
    owners += gc.get_referrers(*attributes) if attributes else []
    modules = (x for x in owners if issubclass(type(x), nn.Module))
    return [x for x in modules if id(x._parameters) in held or id(x._modules) in held]
