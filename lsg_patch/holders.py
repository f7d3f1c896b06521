"""What a model comes in, a pipeline or a module that tokenizes, and where it truncates its inputs."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from lsg_patch.undo import Change, Journal, record_of

logger = logging.getLogger(__name__)

# of an owner that hands a length to its tokenizer; as properties they are the tokenizer's own limit
OWN_LIMITS = ("max_seq_length", "max_length")
# lengths that somebody chose for one use, and the dictionaries in which they may stand
CHOSEN = ("max_length", "max_seq_len", "document_length", "query_length")
CHOSEN_IN = ("_preprocess_params", "processing_kwargs", "tokenizer_kwargs", "text", "common")


class Holder(Protocol):
    """A pipeline of transformers, or what else is no module and holds one beside its tokenizer."""

    model: Any
    tokenizer: Any


def module_of(holder: Any) -> Any:
    """The module that a pipeline holds; anything else is given back as it is."""
    if isinstance(holder, nn.Module) or not hasattr(holder, "tokenizer"):
        return holder
    model = getattr(holder, "model", None)
    return model if isinstance(model, nn.Module) else holder


def owners_of(holder: Any, base: nn.Module) -> list[Any]:
    """What tokenizes for ``base``: the innermost module around it that can, and a pipeline."""
    module = module_of(holder)
    around = [outer for outer in module.modules() if any(x is base for x in outer.modules())]
    owners = [outer for outer in around if tokenizer_in(outer) is not None][-1:]
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
    found = False
    for owner in (*owners, None):
        source = tokenizer if owner is None else tokenizer_in(owner)
        for target, name in _limits_of(owner, source):
            found = True
            change = LimitSet(target, name, _get(target, name), length, readable)
            if change.old == length:
                continue
            if owner is None:
                journal.record(Outside(change))
            else:
                _record_on(owner, journal).record(change)
            change.put(length)
            shown = type(target if owner is None else owner).__name__
            logger.info("%s of %s is %d instead of %s", name, shown, length, change.old)
    chosen = [text for owner in owners for text in _chosen(owner, vars(owner), length)]
    if chosen:
        logger.warning(
            "left as they were chosen, and going on to truncate inputs: %s; the model reads %d tokens",
            ", ".join(chosen),
            length,
        )
    return found


def stated_limit(owners: list[Any], tokenizer: Any, most: int) -> tuple[int, str] | None:
    """The least number of tokens, up to ``most``, at which ``owners`` or a ``tokenizer`` truncate, and
    in words where it stands.
    """
    found = []
    for owner in (*owners, None):
        source = tokenizer if owner is None else tokenizer_in(owner)
        for target, name in _limits_of(owner, source):
            value, shown = _get(target, name), type(target if owner is None else owner).__name__
            # tokenizers that know no limit state a huge one
            if isinstance(value, int) and 1 <= value <= most:
                found.append((value, f"the {name} of {shown}"))
    return min(found, default=None)


def _record_on(owner: Any, journal: Journal) -> Journal:
    """What ``owner`` carries of its changes, which are undone with ``journal``."""
    own = record_of(owner)
    if own is None:
        own = Journal(owner)
        journal.record(Outside(own))
    return own


def _limits_of(owner: Any, tokenizer: Any) -> Iterator[tuple[Any, str]]:
    """The places of all limits that nobody chose for one use: an object or a dictionary, and a name."""
    if hasattr(tokenizer, "model_max_length"):
        yield tokenizer, "model_max_length"
    own = {} if owner is None else vars(owner)
    for name in OWN_LIMITS:
        # None: the tokenizer's
        if isinstance(own.get(name), int):
            yield owner, name
    parameters = own.get("_preprocess_params")
    if isinstance(parameters, dict) and getattr(tokenizer, "is_fast", False):
        # question answering cuts a text to windows of 384 tokens unless it is told a length;
        # with a slow tokenizer it would pad to that length
        takes = inspect.signature(owner.preprocess).parameters
        if "max_seq_len" in takes and "max_seq_len" not in parameters:
            yield parameters, "max_seq_len"


def _chosen(owner: Any, space: dict[str, Any], length: int) -> Iterator[str]:
    for name, value in space.items():
        if name in CHOSEN and isinstance(value, int) and value < length:
            yield f"{name}={value} of {type(owner).__name__}"
        elif name in CHOSEN_IN and isinstance(value, dict):
            yield from _chosen(owner, value, length)


def _get(target: Any, name: str) -> Any:
    return target.get(name) if isinstance(target, dict) else getattr(target, name)


@dataclass
class LimitSet(Change):
    """One limit, ``name`` of an object or in a dictionary; ``old`` None: there was none."""

    target: Any
    name: str
    old: int | None
    new: int
    readable: int | None

    def put(self, value: int | None) -> None:
        if not isinstance(self.target, dict):
            setattr(self.target, self.name, value)
        elif value is None:
            self.target.pop(self.name, None)
        else:
            self.target[self.name] = value

    def undo(self) -> None:
        """A limit that was set by hand stays, if the unpatched model reads so many tokens."""
        value = _get(self.target, self.name)
        allowed = [limit for limit in (self.old, self.readable) if limit is not None]
        by_hand = isinstance(value, int) and value != self.new
        if not (by_hand and value <= min(allowed, default=value)):
            self.put(self.old)


@dataclass
class Outside(Change):
    """A change outside of the base model: a copy of that alone has no part in it, and copies none of it."""

    change: Change | None

    def undo(self) -> None:
        if self.change is not None:
            self.change.undo()

    def __reduce__(self) -> Any:
        return Outside, (None,)
