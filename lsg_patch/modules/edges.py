"""What runs before and after a base model: forward hooks, or a mixin below a user's own forward.

A hook sees the arguments of the call. For a base model they are those of transformers, unless a user's
class overrides its forward: then the hooks run around the forward that it calls by ``super()``. Inner
modules are always called by transformers, with its arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lsg_patch import compat
from lsg_patch.modules.swapped import Swapped, swap_class
from lsg_patch.undo import Journal

Hook = Callable[..., Any]


@dataclass
class EdgeHooks:
    """Forward hooks with keywords, in the order in which they run."""

    before: tuple[Hook, ...] = ()
    after: tuple[Hook, ...] = ()


class LSGEdges(Swapped):
    """Mixed into the class of a module whose forward is overridden; it keeps its name."""

    lsg: EdgeHooks

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the forward of transformers gives, between the hooks."""
        for hook in self.lsg.before:
            args, kwargs = hook(self, args, kwargs)
        output = super().forward(*args, **kwargs)
        for hook in self.lsg.after:
            output = hook(self, args, kwargs, output)
        return output


def before(module: nn.Module, hook: Hook, journal: Journal) -> None:
    """Call ``hook(module, args, kwargs)`` before the forward of transformers, for its arguments."""
    if not compat.is_overridden(type(module)):
        journal.before(module, hook)
    else:
        _hooks_of(module, journal).before += (hook,)


def after(module: nn.Module, hook: Hook, journal: Journal) -> None:
    """Call ``hook(module, args, kwargs, output)`` after it, before the hooks of others."""
    if not compat.is_overridden(type(module)):
        journal.after(module, hook)
    else:
        hooks = _hooks_of(module, journal)
        hooks.after = (hook, *hooks.after)


def _hooks_of(module: Any, journal: Journal) -> EdgeHooks:
    if not isinstance(module, LSGEdges):
        swap_class(module, LSGEdges, EdgeHooks(), journal)
    hooks: EdgeHooks = module.lsg
    return hooks
