"""Modules whose class is swapped for a subclass that is made at run time, and back.

A module stays the same object, with the same parameters, hooks and children, and stays an instance
of the class that it was. Copies, pickles and replicas are of the subclass too.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from lsg_patch.undo import Journal


class State(Protocol):
    """What a swapped module knows besides what it was."""

    @property
    def journal(self) -> Journal:
        """All that was changed of it, so that a copy of it alone can be reverted too."""


class Swapped(nn.Module):
    """Mixed into the class of a module, first: what it defines stands before what was there."""

    prefix = ""  # of the subclass's name
    mixin: type[Swapped]
    original: type[nn.Module]
    lsg: State

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made at run time: a copy or a pickle names what it was made of
        return _blank, (self.mixin, self.original), self.__dict__.copy()


_CLASSES: dict[tuple[type[Swapped], type[nn.Module]], type[nn.Module]] = {}


def swapped_class(mixin: type[Swapped], cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``cls`` that has the ``mixin``; always the same one."""
    if (mixin, cls) not in _CLASSES:
        attributes = {"__module__": mixin.__module__, "mixin": mixin, "original": cls}
        made = type(mixin.prefix + cls.__name__, (mixin, cls), attributes)
        _CLASSES.setdefault((mixin, cls), made)
    return _CLASSES[mixin, cls]


def swap_class(module: nn.Module, mixin: type[Swapped], state: State) -> None:
    """Make ``module`` an instance of its class with the ``mixin``, which finds the ``state`` as ``lsg``."""
    state.journal.set_attribute(module, "lsg", state)
    state.journal.set_class(module, swapped_class(mixin, type(module)))


def journals_of(root: nn.Module) -> list[Journal]:
    """The records of all swapped modules below ``root``, and of itself."""
    return [module.lsg.journal for module in root.modules() if isinstance(module, Swapped)]


def _blank(mixin: type[Swapped], cls: type[nn.Module]) -> nn.Module:
    """A module of that class without contents; whoever copies it fills it."""
    made = swapped_class(mixin, cls)
    return made.__new__(made)
