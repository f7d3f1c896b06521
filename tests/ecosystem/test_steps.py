"""Hard use beside a twin, as in tests/test_stateful.py, with LoRA put on and taken off as well."""

from __future__ import annotations

from tests.stateful import run_sequences, steps


def test_two_hundred_steps_with_lora() -> None:
    before = steps["LoRA on"]
    run_sequences(5, 40, of_seed=101)
    assert steps["LoRA on"] > before
