"""Modules whose class is swapped for a subclass that is made at run time, and back.

A module stays the same object, with the same parameters, hooks and children, and stays an instance
of the class that it was. Copies, pickles and replicas are of the subclass too.

A mixin precedes the class of transformers in the MRO. A user's class that overrides its forward keeps
that forward, which reaches the mixin by ``super()``:

    BertModel               -> made(mixin, BertModel)
    Theirs(BertModel)       -> made(Theirs, made(mixin, BertModel))
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn

from lsg_patch import compat
from lsg_patch.undo import Change, Journal


class Swapped(nn.Module):
    """Mixed into the class of a module: its methods override those of transformers."""

    prefix = ""  # of the subclass's name
    mixin: type[Swapped]
    original: type[nn.Module]
    outlives_patch = False  # whether its forward may be called after a revert
    lsg: Any  # what it knows besides what it was

    def __init_subclass__(cls) -> None:
        """What is made of a user's class is no other class of theirs: their own hook is not called."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """What is made of the class of a patched module, as ``type(model)(config)``, is not patched."""
        return cls.original(*args, **kwargs) if args or kwargs else super().__new__(cls)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made at run time: a copy or a pickle names what it was made of
        own = getattr(self, "__getstate__", None)  # a user's, or (Python 3.11) that of all objects
        return _blank, (self.mixin, self.original), self.__dict__.copy() if own is None else own()


class _Unannounced:
    """Before a user's class in the MRO, for the same."""

    def __init_subclass__(cls) -> None: ...


_one_at_a_time = threading.RLock()


def swapped_class(mixin: type[Swapped], cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``cls`` that has the ``mixin``; the same one as long as anything is of it."""
    with _one_at_a_time:
        return _swapped_class(mixin, cls)  # type: ignore[arg-type]  # a class can be hashed


# some are kept though nothing is of them: what is compiled fits a model that is patched again
@functools.lru_cache(maxsize=256)
def _swapped_class(mixin: type[Swapped], cls: type[nn.Module]) -> type[nn.Module]:
    for made in cls.__subclasses__():
        if (vars(made).get("mixin"), vars(made).get("original")) == (mixin, cls):
            return made
    bases: tuple[type[nn.Module], ...] = (mixin, cls)
    if compat.is_overridden(cls):
        bases = (_Unannounced, cls, swapped_class(mixin, compat.own_class(cls)))  # type: ignore[assignment]
    # transformers records outputs by the name of a class and of its module
    name = mixin.prefix + cls.__name__
    attributes = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__.removesuffix(cls.__name__) + name,
        "mixin": mixin,
        "original": cls,
        "__init__": _made_by_new,
    }
    return type(name, bases, attributes)


def swap_class(module: nn.Module, mixin: type[Swapped], state: Any, journal: Journal) -> None:
    """Make ``module`` an instance of its class with the ``mixin``, which finds the ``state`` as ``lsg``."""
    old = type(module)
    journal.set_attribute(module, "lsg", state)
    journal.of(module).record(ClassSwapped(module, mixin, old))
    set_class(module, swapped_class(mixin, old))


@dataclass
class ClassSwapped(Change):
    module: nn.Module
    mixin: type[Swapped]
    old: type[nn.Module]

    def hindrance(self) -> str | None:
        now, made = type(self.module), swapped_class(self.mixin, self.old)
        if now not in (made, self.old):  # the latter where a revert was interrupted
            return (
                f"it was a {made.__name__} and was made a {now.__name__} by something else, which is to be "
                "taken away first"
            )
        return None if self.mixin.outlives_patch else hidden_forward(self.module)

    def undo(self) -> None:
        set_class(self.module, self.old)


def set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """What the module keeps bound of its own methods are those of the new class then.

    So does accelerate, whose hooks call the forward that they met.
    """
    for name, method in _bound_methods(module):
        vars(module)[name] = MethodType(getattr(cls, method.__name__, method.__func__), module)
    module.__class__ = cls


def _bound_methods(module: nn.Module) -> list[tuple[str, MethodType]]:
    """The methods of its class that ``module`` keeps itself, bound, under whatever names."""
    return [
        (name, value)
        for name, value in vars(module).items()
        if isinstance(value, MethodType)
        and value.__self__ is module
        and value.__func__ is getattr(type(module), value.__name__, None)
    ]


def hidden_forward(module: nn.Module) -> str | None:
    """What hides the forward of the class of ``module``, so that another class's would go unseen.

    Its own one, bound, does not (transformers 5.0 and 5.1 leave one wherever they recorded outputs),
    nor does accelerate's, which calls a bound one that the module keeps.
    """
    own, kept = vars(module).get("forward"), dict(_bound_methods(module))
    by_accelerate = isinstance(own, functools.partial) and own.args == (module,)
    if own is None or "forward" in kept or (by_accelerate and "_old_forward" in kept):
        return None
    return (
        f"its forward was replaced by a {type(own).__name__}, which would hide the patch: patch the "
        "model first, or take the replacement away"
    )


def _made_by_new(self: Any, *args: Any, **kwargs: Any) -> None:
    """Nothing: what ``__new__`` gives is made, and would be made again if its class patches itself."""


def _blank(mixin: type[Swapped], cls: type[nn.Module]) -> nn.Module:
    """An empty module of that class; ``copy`` and ``pickle`` fill it."""
    made = swapped_class(mixin, cls)
    return made.__new__(made)
