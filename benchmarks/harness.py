"""Sides that are run in turn, and what comes out of it.

A machine's speed drifts while a benchmark runs. So each round runs every side once, in turn, and
the ratio of two sides is taken round by round: what both met in the same few seconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median


@dataclass(frozen=True)
class Side:
    """Something to be measured; the first side of a comparison is what the others are held to."""

    name: str
    call: Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """Median, least and most of some measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class Record:
    """One line of the results: a side of a comparison in one case (say, at one length)."""

    comparison: str
    case: str
    side: str
    ratio: Spread  # to the comparison's reference, round by round
    best: float  # ratio of the fastest runs: what a busy machine disturbs least
    value: Spread  # in `unit`
    unit: str
    samples: int
    bar: float | None = None  # the most that the median ratio may be,
    is_best_held: bool = False  # or, if so, the best one

    @property
    def missed(self) -> bool:
        held = self.best if self.is_best_held else self.ratio.median
        return self.bar is not None and held > self.bar


@dataclass(frozen=True)
class Rounds:
    """How often a comparison is repeated: as often as fits into `seconds`, within bounds."""

    seconds: float = 15.0
    least: int = 5
    most: int = 40

    def after(self, warm_up: float) -> int:
        """Number of rounds when one of them takes `warm_up` seconds."""
        return max(self.least, min(self.most, math.ceil(self.seconds / max(warm_up, 1e-9))))


@dataclass(frozen=True)
class Options:
    """What a comparison is to measure."""

    lengths: tuple[int, ...]
    selections: tuple[str, ...] = ("norm",)
    layers: int = 2
    rounds: Rounds = field(default_factory=Rounds)
    clock: Callable[[], float] = time.perf_counter


def time_sides(
    sides: Sequence[Side], rounds: Rounds, clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """Seconds of each side (in the sides' order) in each round, after one or two of warm-up.

    The first round of warm-up pays for what is set up once; the second one tells the speed, where
    the first has not taken so long already that the one says little about the other.
    """

    def one_round() -> list[float]:
        times = []
        for side in sides:
            start = clock()
            side.call()
            times.append(clock() - start)
        return times

    warm_up = sum(one_round())
    if warm_up < rounds.seconds:
        warm_up = sum(one_round())
    count = rounds.after(warm_up)
    return [list(times) for times in zip(*(one_round() for _ in range(count)), strict=True)]


def records_of(
    comparison: str,
    case: str,
    sides: Sequence[Side],
    seconds: Sequence[Sequence[float]],
    bar: Callable[[str, str, str], float | None],
) -> list[Record]:
    """Records of timed sides; the first is the reference and has no bar."""
    reference = seconds[0]
    return [
        Record(
            comparison=comparison,
            case=case,
            side=side.name,
            ratio=Spread.of([t / r for t, r in zip(times, reference, strict=True)]),
            best=min(times) / min(reference),
            value=Spread.of([1e3 * t for t in times]),
            unit="ms",
            samples=len(times),
            bar=None if index == 0 else bar(comparison, case, side.name),
        )
        for index, (side, times) in enumerate(zip(sides, seconds, strict=True))
    ]


def render(records: Sequence[Record]) -> str:
    """Records as an aligned table, the ratio first."""
    header = (
        *("comparison", "case", "side", "ratio", "(min..max)", "best", "bar"),
        *("median", "(min..max)", "n"),
    )
    rows: list[tuple[str, ...]] = [header]
    for r in records:
        digits = 1 if r.value.high < 1000 else 0
        rows.append(
            (
                r.comparison,
                r.case,
                r.side,
                f"{r.ratio.median:.2f}",
                f"({r.ratio.low:.2f}..{r.ratio.high:.2f})",
                f"{r.best:.2f}",
                "" if r.bar is None else f"{'MISSED ' if r.missed else ''}{r.bar:.2f}",
                f"{r.value.median:,.{digits}f} {r.unit}",
                f"({r.value.low:,.{digits}f}..{r.value.high:,.{digits}f})",
                str(r.samples),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
