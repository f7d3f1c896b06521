"""Arguments of a call: by position in one version of transformers, by name in another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


@dataclass(frozen=True)
class Argument:
    """A parameter of a forward, found by keyword or by position (None: by keyword only).

    Positions are looked up once, when a model is patched: compiled code cannot search.
    """

    name: str
    position: int | None

    @classmethod
    def of(cls, parameters: tuple[str, ...], *names: str) -> Argument:
        """The first of ``names`` that is among ``parameters``, else the first name by keyword."""
        name = next((name for name in names if name in parameters), names[0])
        return cls(name, parameters.index(name) if name in parameters else None)

    def get(self, args: Args, kwargs: Kwargs) -> Any:
        if self.position is not None and self.position < len(args):
            return args[self.position]
        return kwargs.get(self.name)

    def put(self, value: Any, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        if self.position is not None and self.position < len(args):
            return args[: self.position] + (value,) + args[self.position + 1 :], kwargs
        return args, {**kwargs, self.name: value}
