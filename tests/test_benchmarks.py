"""The harness on sides whose time is made up: `python -m pytest benchmarks`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.bars import bar
from benchmarks.comparisons import COMPARISONS
from benchmarks.harness import Record, Rounds, Side, Spread, records_of, render, time_sides


class Clock:
    """Time passes only where a side says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def side(self, name: str, *seconds: float) -> Side:
        """A side that takes these seconds, one after the other, and then again."""
        calls = iter(range(10**6))

        def call() -> None:
            self.log.append(name)
            self.now += seconds[next(calls) % len(seconds)]

        return Side(name, call)


def test_sides_run_in_turn_and_warm_up_is_not_counted() -> None:
    clock = Clock()
    sides = [clock.side("a", 9, 1, 2, 3), clock.side("b", 9, 2, 2, 9)]
    seconds = time_sides(sides, Rounds(seconds=0, least=2, most=5), clock)
    assert "".join(clock.log) == "ab" * (2 + 2)
    assert seconds == [[2, 3], [2, 9]]


def test_rounds_fill_the_time_within_bounds() -> None:
    rounds = Rounds(seconds=10, least=3, most=20)
    assert [rounds.after(s) for s in (100, 2.5, 1, 0.1, 0)] == [3, 4, 10, 20, 20]


def test_ratios_are_taken_round_by_round() -> None:
    sides = [Side("full", lambda: None), Side("norm", lambda: None)]
    # The machine is ten times slower in the second round, for both.
    seconds = [[1.0, 10.0, 1.0], [0.5, 5.0, 0.6]]
    full, norm = records_of("forward", "4096 tokens", sides, seconds, bar)
    assert full.ratio == Spread(1, 1, 1) and full.bar is None
    assert norm.ratio == Spread(0.5, 0.5, 0.6)
    assert norm.value == Spread(600, 500, 5000)
    assert norm.best == 0.5 and norm.samples == 3
    assert norm.bar == 0.75 and not norm.missed


def test_bars() -> None:
    assert bar("forward", "4096 tokens", "norm") == 0.75
    assert bar("forward", "4096 tokens", "lsh") == 0.85
    assert bar("forward", "128 tokens", "lsh") == 1.05
    assert bar("forward", "1024 tokens", "norm") is None
    assert bar("memory", "8192 to 32768 tokens", "norm") == 4.4


def made_up(ratio: float) -> Record:
    spread = Spread(ratio, ratio, ratio)
    return Record("made up", "4096 tokens", "norm", spread, ratio, spread, "ms", 1, bar=0.75)


@pytest.mark.parametrize(
    ("ratio", "check", "code"), [(0.7, True, 0), (0.8, True, 1), (0.8, False, 0)]
)
def test_check_fails_where_a_bar_is_missed(
    ratio: float,
    check: bool,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(COMPARISONS, "made-up", lambda options: iter([[made_up(ratio)]]))
    path = tmp_path / "results.json"
    assert main(["made-up", "--json", str(path), *(["--check"] if check else [])]) == code
    (record,) = json.loads(path.read_text())["records"]
    assert record["missed"] == (ratio > 0.75)
    assert ("MISSED" in capsys.readouterr().out) == (ratio > 0.75)


def test_the_table_is_aligned() -> None:
    lines = render([made_up(0.5), made_up(12.25)]).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_the_real_comparison_runs(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    argv = ["forward", "--lengths", "16", "300", "--layers", "1", "--repeats", "1"]
    assert main([*argv, "--json", str(path)]) == 0
    records = json.loads(path.read_text())["records"]
    assert [r["side"] for r in records[:3]] == ["full (sdpa)", "norm", "pooling"]
    assert {r["case"] for r in records} == {"16 tokens", "300 tokens"}
    assert len(records) == 2 * 8
