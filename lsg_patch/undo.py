"""The record of what was changed, in order, and its exact reversal.

A record lives on the module that it is about, so that a deep copy or a pickle of the module carries
a record of its own; that of a base model holds those of all that was changed with it. Changes are
therefore plain objects that refer to modules, never closures. Each is on record before it is made, so
that an interrupt in between is reverted as well: to undo what was not done changes nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lsg_patch import offloading

RECORD = "_lsg_record"


class Change(ABC):
    """Something done to a model that can be taken back."""

    def hindrance(self) -> str | None:
        """What keeps it from being taken back, and the mend, in words."""
        return None

    @abstractmethod
    def undo(self) -> None: ...


@dataclass
class Journal(Change):
    """Changes of ``owner``, which carries them, and of what was changed with it, in order."""

    owner: Any
    changes: list[Change] = field(default_factory=list)

    def attach(self) -> None:
        """Let the owner carry it."""
        setattr(self.owner, RECORD, self)

    def of(self, module: Any) -> Journal:
        """The record that ``module`` carries; this one for what is no module."""
        if not isinstance(module, nn.Module):
            return self
        own = record_of(module)
        if own is None:
            own = Journal(module)
            self.changes.append(own)
            own.attach()
        return own

    def record(self, change: Change) -> None:
        self.changes.append(change)

    def hindrance(self) -> str | None:
        return next(filter(None, (change.hindrance() for change in self.changes)), None)

    def undo(self) -> None:
        """Take everything back, the last change first; what fails stays and does not keep the rest.

        Where that is interrupted another call completes it: no change is forgotten before it is undone,
        and to undo one twice is to undo it once.
        """
        failed: Exception | None = None
        for at in reversed(range(len(self.changes))):
            try:
                self.changes[at].undo()
                del self.changes[at]
            except Exception as error:
                failed = failed or error
        if failed is not None:
            raise failed
        vars(self.owner).pop(RECORD, None)

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """``owner.name = value``, a plain attribute."""
        existed = name in vars(owner)
        old = getattr(owner, name) if existed else None
        self.of(owner).record(AttributeSet(owner, name, existed, old))
        setattr(owner, name, value)

    def add(self, owner: nn.Module, name: str, child: nn.Module | Tensor) -> None:
        """A module, or a buffer, which moves with its owner and is not saved."""
        self.of(owner).record(ChildAdded(owner, name))
        if isinstance(child, Tensor):
            owner.register_buffer(name, child, persistent=False)
        else:
            owner.add_module(name, child)

    def before(self, module: nn.Module, hook: Callable[..., Any], with_kwargs: bool = True) -> None:
        """Call ``hook`` before the forward of ``module``."""
        self.hook(module, module.register_forward_pre_hook, hook, with_kwargs=with_kwargs)

    def after(self, module: nn.Module, hook: Callable[..., Any], with_kwargs: bool = True) -> None:
        """Call ``hook`` after it, before others, which then see what the unpatched module gives."""
        register = module.register_forward_hook
        self.hook(module, register, hook, with_kwargs=with_kwargs, prepend=True)

    def hook(
        self, module: nn.Module, register: Callable[..., RemovableHandle], *args: Any, **kwargs: Any
    ) -> None:
        """Call ``register``, which adds a hook to ``module``, with these arguments."""
        added = HookAdded()
        self.of(module).record(added)
        added.handle = register(*args, **kwargs)


def record_of(module: Any) -> Journal | None:
    """What ``module``, or a pipeline, carries of its changes."""
    own: Journal | None = vars(module).get(RECORD)
    return own


def records_of(root: nn.Module) -> Iterator[tuple[str, Journal]]:
    """The records of ``root`` and all below it, by their paths."""
    for name, module in root.named_modules():
        own = record_of(module)
        if own is not None:
            yield name, own


@dataclass
class AttributeSet(Change):
    owner: Any
    name: str
    existed: bool
    old: Any

    def undo(self) -> None:
        if self.existed:
            setattr(self.owner, self.name, self.old)
        else:
            vars(self.owner).pop(self.name, None)


@dataclass
class ChildAdded(Change):
    """A module or a buffer was added; if it was removed since, there is nothing to undo."""

    owner: nn.Module
    name: str

    def undo(self) -> None:
        if hasattr(self.owner, self.name):
            delattr(self.owner, self.name)
        offloading.forget(self.owner, self.name)


@dataclass
class HookAdded(Change):
    handle: RemovableHandle | None = None

    def undo(self) -> None:
        if self.handle is not None:
            self.handle.remove()
