"""What runs before and after a model, or an encoder that embeds its input: below the hooks of others.

A mixin in the class of the module runs it around the forward of transformers, inside of a user's own
forward and of all hooks, so that these see what the unpatched model takes and gives. Where something has
replaced the forward of the one module, it is hooks of that.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lsg_patch.modules.swapped import Swapped, hidden_forward, swap_class
from lsg_patch.undo import Journal

Hook = Callable[..., Any]


@dataclass
class EdgeHooks:
    """What is called, in that order."""

    before: tuple[Hook, ...] = ()
    after: tuple[Hook, ...] = ()


class LSGEdges(Swapped):
    """Mixed into the class of a module, which keeps its name."""

    lsg: EdgeHooks
    outlives_patch = True

    def __init_subclass__(cls) -> None:
        if cls.__bases__[0] is LSGEdges:
            cls.forward = _between_hooks(cls.__bases__[1])


def _between_hooks(original: Any) -> Callable[..., Any]:
    """A forward that is that of ``original`` between the hooks, with its parameters: tools ask for them."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # none: what others put around this forward goes on calling it after a revert
        hooks = getattr(self, "lsg", None) or EdgeHooks()
        for hook in hooks.before:
            args, kwargs = hook(self, args, kwargs)
        output = original.forward(self, *args, **kwargs)
        for hook in hooks.after:
            output = hook(self, args, kwargs, output)
        return output

    # no __wrapped__: accelerate would follow that below the patch
    forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
    return forward


def before(module: nn.Module, hook: Hook, journal: Journal) -> None:
    """Call ``hook(module, args, kwargs)`` before the forward of transformers, for its arguments."""
    if hidden_forward(module):
        journal.before(module, hook)
    else:
        _hooks_of(module, journal).before += (hook,)


def after(module: nn.Module, hook: Hook, journal: Journal) -> None:
    """Call ``hook(module, args, kwargs, output)`` after it, before the hooks of others."""
    if hidden_forward(module):
        journal.after(module, hook)
    else:
        hooks = _hooks_of(module, journal)
        hooks.after = (hook, *hooks.after)


def _hooks_of(module: Any, journal: Journal) -> EdgeHooks:
    if not isinstance(module, LSGEdges):
        swap_class(module, LSGEdges, EdgeHooks(), journal)
    hooks: EdgeHooks = module.lsg
    return hooks
