"""What a model comes in, a pipeline or a module that tokenizes, and where it truncates its inputs."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakSet

from torch import nn

from lsg_patch.undo import Change, Journal, record_of

logger = logging.getLogger(__name__)

# of an owner that hands a length to its tokenizer; as properties they are the tokenizer's own limit
OWN_LIMITS = ("max_seq_length", "max_length")
# lengths that a user chose for one use, and the dictionaries that may hold them
CHOSEN = ("max_length", "max_seq_len", "document_length", "query_length")
CHOSEN_IN = ("_preprocess_params", "processing_kwargs", "tokenizer_kwargs", "text", "common")


class Holder(Protocol):
    """A pipeline of transformers, or what else is no module and holds one beside its tokenizer."""

    model: Any
    tokenizer: Any


def module_of(holder: Any) -> Any:
    """``holder`` itself, or the module that a pipeline holds.

    Raises:
        TypeError: there is none.
    """
    found = holder
    if not isinstance(holder, nn.Module) and hasattr(holder, "tokenizer"):
        found = getattr(holder, "model", None)
    if not isinstance(found, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, or a pipeline that holds one, not {type(holder).__name__}"
        )
    return found


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Without dropout; which modules are in training mode is as it was afterwards."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def owners_of(holder: Any, base: nn.Module) -> list[Any]:
    """What tokenizes for ``base``: the innermost module around it that can, and a pipeline."""
    module = module_of(holder)
    owners = [
        outer
        for outer in module.modules()  # from the outside in
        if tokenizer_in(outer) is not None and any(inner is base for inner in outer.modules())
    ][-1:]
    if holder is not module and tokenizer_in(holder) is not None:
        owners.append(holder)
    return owners


def tokenizer_in(owner: Any) -> Any:
    """The tokenizer of ``owner``, or that of its processor; None: there is none."""
    for name in ("tokenizer", "processor"):
        found = getattr(owner, name, None)
        found = getattr(found, "tokenizer", found)
        if hasattr(found, "model_max_length"):
            return found
    return None


def set_limits(
    owners: list[Any], tokenizer: Any, length: int, readable: int | None, journal: Journal
) -> bool:
    """Let ``owners``, and a ``tokenizer`` that was given, truncate at ``length`` tokens; whether any can.

    An owner carries the record of it, so that a copy of it has that of its own tokenizer.

    Args:
        readable: how many tokens the unpatched model reads; None: any number.
    """
    limits = list(_limits(owners, tokenizer))
    for owner, target, name in limits:
        change = LimitSet(target, name, getattr(target, name), length, readable)
        if owner is tokenizer:
            journal.record(Outside(change))
        else:
            _record_on(owner, journal).record(change)
        if change.old != length:
            setattr(target, name, length)
            shown = type(owner).__name__
            logger.info("%s of %s is %d instead of %d", name, shown, length, change.old)
    chosen: list[str] = []
    for owner in owners:
        if _reads_windows(owner):
            given = {**owner._preprocess_params, "max_seq_len": length}
            _record_on(owner, journal).set_attribute(owner, "_preprocess_params", given)
        chosen += (f"{text} of {type(owner).__name__}" for text in _chosen(vars(owner), length))
    if chosen:
        logger.warning(
            "left as they were chosen, and going on to truncate inputs: %s; the model reads %d tokens",
            ", ".join(chosen),
            length,
        )
    return bool(limits)


def stated_limit(owners: list[Any], tokenizer: Any, most: int) -> tuple[int, str] | None:
    """The least number of tokens, up to ``most``, at which ``owners`` or a ``tokenizer`` truncate, and
    in words where it is set.
    """
    stated = (
        (getattr(target, name), f"the {name} of {type(owner).__name__}")
        for owner, target, name in _limits(owners, tokenizer)
    )
    # tokenizers that know no limit state a huge one
    return min((x for x in stated if isinstance(x[0], int) and 1 <= x[0] <= most), default=None)


def _limits(owners: list[Any], tokenizer: Any) -> Iterator[tuple[Any, Any, str]]:
    """All limits that nobody chose for one use: who has it, and the object and attribute that it is."""
    for owner in owners:
        yield owner, tokenizer_in(owner), "model_max_length"
        for name in OWN_LIMITS:
            # None: the tokenizer's
            if isinstance(vars(owner).get(name), int):
                yield owner, owner, name
    if hasattr(tokenizer, "model_max_length"):
        yield tokenizer, tokenizer, "model_max_length"


def _record_on(owner: Any, journal: Journal) -> Journal:
    """What ``owner`` carries of its changes, which are undone with ``journal``."""
    own = record_of(owner)
    if own is None:
        own = Journal(owner)
        journal.record(Outside(own))
        own.attach()
    return own


def _reads_windows(owner: Any) -> bool:
    """Whether it is a pipeline that cuts a text to windows of 384 tokens unless it is told a length.

    That for question answering does; with a slow tokenizer it would pad to the length.
    """
    given = vars(owner).get("_preprocess_params")
    if not isinstance(given, dict) or "max_seq_len" in given:
        return False
    takes = inspect.signature(owner.preprocess).parameters
    return "max_seq_len" in takes and bool(getattr(tokenizer_in(owner), "is_fast", False))


def _chosen(space: dict[str, Any], length: int) -> Iterator[str]:
    for name, value in space.items():
        if name in CHOSEN and isinstance(value, int) and value < length:
            yield f"{name}={value}"
        elif name in CHOSEN_IN and isinstance(value, dict):
            yield from _chosen(value, length)


@dataclass(eq=False)
class LimitSet(Change):
    """One limit, the attribute ``name`` of ``target``."""

    target: Any
    name: str
    old: int
    new: int
    readable: int | None

    def __post_init__(self) -> None:
        with _one_at_a_time:
            _in_force.add(self)

    def undo(self) -> None:
        """A limit that was set by hand stays, if the unpatched model reads so many tokens.

        That of a tokenizer which another patched model has as well is left to that one's revert.
        """
        with _one_at_a_time:
            _in_force.discard(self)
            for other in _in_force:
                same = other.target is self.target and other.name == self.name
                if same and other.old == self.new:
                    other.old = self.old
                    return
        value = getattr(self.target, self.name)
        by_hand = isinstance(value, int) and value != self.new
        if not by_hand or value > min(self.old, self.readable or self.old):
            setattr(self.target, self.name, self.old)


_in_force: WeakSet[LimitSet] = WeakSet()
_one_at_a_time = threading.Lock()


@dataclass
class Outside(Change):
    """A change outside of the base model: a copy of that alone has no part in it, and copies none of it."""

    change: Change | None

    def undo(self) -> None:
        if self.change is not None:
            self.change.undo()

    def __reduce__(self) -> Any:
        return Outside, (None,)
