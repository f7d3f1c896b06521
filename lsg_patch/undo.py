"""The record of what was changed, in order, and its exact reversal.

A record lives on the model that it is about, so that a deep copy or a pickle of the model carries
a record of its own. Changes are therefore plain objects that refer to modules, never closures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Change(Protocol):
    """Something done to a model that can be taken back."""

    def undo(self) -> None: ...


@dataclass
class Journal:
    """Changes in the order in which they were made."""

    changes: list[Change] = field(default_factory=list)

    def record(self, change: Change) -> None:
        self.changes.append(change)

    def undo(self) -> None:
        """Take everything back, the last change first; what fails does not keep the rest."""
        failed: Exception | None = None
        while self.changes:
            try:
                self.changes.pop().undo()
            except Exception as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """``owner.name = value``, a plain attribute."""
        existed = name in vars(owner)
        self.record(AttributeSet(owner, name, existed, getattr(owner, name) if existed else None))
        setattr(owner, name, value)

    def set_class(self, module: nn.Module, cls: type[nn.Module]) -> None:
        """Make ``module`` an instance of ``cls``, a subclass of what it was."""
        self.record(ClassMoved(module, type(module)))
        module.__class__ = cls

    def add_module(self, owner: nn.Module, name: str, child: nn.Module) -> None:
        self.record(ChildAdded(owner, name))
        owner.add_module(name, child)

    def add_buffer(self, owner: nn.Module, name: str, buffer: Tensor) -> None:
        """A buffer that moves with the module and is not saved."""
        self.record(ChildAdded(owner, name))
        owner.register_buffer(name, buffer, persistent=False)

    def add_hook(self, handle: RemovableHandle) -> None:
        self.record(HookAdded(handle))


@dataclass
class AttributeSet:
    owner: Any
    name: str
    existed: bool
    old: Any

    def undo(self) -> None:
        if self.existed:
            setattr(self.owner, self.name, self.old)
        else:
            delattr(self.owner, self.name)


@dataclass
class ClassMoved:
    module: nn.Module
    old: type[nn.Module]

    def undo(self) -> None:
        self.module.__class__ = self.old


@dataclass
class ChildAdded:
    owner: nn.Module
    name: str

    def undo(self) -> None:
        delattr(self.owner, self.name)


@dataclass
class HookAdded:
    handle: RemovableHandle

    def undo(self) -> None:
        self.handle.remove()
