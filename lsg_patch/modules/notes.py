"""What the hooks of a model tell later ones of the same call."""

from __future__ import annotations

from contextvars import ContextVar

from torch import Tensor

from lsg_patch.attention.compiling import is_compiling


class Note:
    """A tensor that is left by one hook and taken by a later one; in compiled code none is.

    The hooks of a model share it, those of its copies have another: hooks of others may call them.
    """

    def leave(self, value: Tensor) -> None:
        if not is_compiling():
            _LEFT.set({**_LEFT.get({}), self: value})

    def take(self) -> Tensor | None:
        """What was left, which is then forgotten."""
        if is_compiling():
            return None
        left = _LEFT.get({})
        _LEFT.set({note: value for note, value in left.items() if note is not self})
        return left.get(self)


# of the calls that are under way in a thread; never changed, but replaced
_LEFT: ContextVar[dict[Note, Tensor]] = ContextVar("left")
