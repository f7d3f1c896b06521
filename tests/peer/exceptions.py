"""Tests that pass unpatched and fail patched, each with its reason."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import NamedTuple


class Allowed(NamedTuple):
    """Patterns of a head's class name and of a test's name, as a shell has them."""

    head: str
    test: str
    reason: str

    def covers(self, head: str, test: str) -> bool:
        return fnmatchcase(head, self.head) and fnmatchcase(test, self.test)


NO_ATTENTIONS = "a patched model computes no (T, T) attention maps: attentions are None"

EXCEPTIONS = (
    Allowed("*", "test_attention_outputs", NO_ATTENTIONS),
    Allowed("*", "test_retain_grad_hidden_states_attentions", NO_ATTENTIONS),
)

# of tests that newer releases have no more
OF_OLDER_RELEASES = (
    Allowed("*", "test_head_pruning*", f"it counts the heads in the attentions; {NO_ATTENTIONS}"),
    Allowed("*", "test_headmasking", "head_mask is refused while a model is patched"),
)


def reason_for(head: str, test: str) -> str | None:
    """Why ``test`` of ``head`` may fail patched; None: it may not."""
    for exception in (*EXCEPTIONS, *OF_OLDER_RELEASES):
        if exception.covers(head, test):
            return exception.reason
    return None
