"""Hard use of patched models, held to twins that were never patched: the short run of `tests.stateful`."""

from tests.stateful import run_sequences


def test_sequences_of_steps() -> None:
    """Two hundred steps, the same each time; longer runs and their reports: `python -m tests.stateful`."""
    run_sequences(examples=10, length=20)
