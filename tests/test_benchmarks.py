"""The harness on sides whose time is made up, and the comparisons on short inputs."""

from __future__ import annotations

import importlib.util
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from benchmarks import comparisons, peers, serving, store
from benchmarks.__main__ import _options, build_parser, main
from benchmarks.bars import BARS, bar
from benchmarks.comparisons import COMPARISONS, QUICK, Comparison
from benchmarks.harness import Record, Rounds, Side, Spread, records_of, render, time_sides
from lsg_patch import exporting


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
    seconds = time_sides(sides, Rounds(seconds=20, least=1, most=2), clock)
    assert "".join(clock.log) == "ab" * (2 + 2)
    assert seconds == [[2, 3], [2, 9]]


def test_one_long_round_of_warm_up_is_enough() -> None:
    clock = Clock()
    sides = [clock.side("a", 9, 1, 2, 3), clock.side("b", 9, 2, 2, 9)]
    seconds = time_sides(sides, Rounds(seconds=15, least=1, most=5), clock)
    assert "".join(clock.log) == "ab" * (1 + 1)
    assert seconds == [[1], [2]]


def test_rounds_fill_the_time_within_bounds() -> None:
    rounds = Rounds(seconds=10, least=3, most=20)
    assert [rounds.after(s) for s in (100, 2.5, 1, 0.1, 0)] == [3, 4, 10, 20, 20]


def test_own_seconds_are_counted_where_they_are_wanted() -> None:
    comparison = COMPARISONS["forward"]
    for given, clock in (([], time.perf_counter), (["--own-seconds"], time.process_time)):
        assert _options(comparison, build_parser().parse_args(given)).clock is clock


def test_ratios_are_taken_round_by_round() -> None:
    sides = [Side("full", lambda: None), Side("norm", lambda: None)]
    # The machine is ten times slower in the second round, for both.
    seconds = [[1.0, 10.0, 1.0], [0.5, 5.0, 0.6]]
    full, norm = records_of("forward", "4096 tokens", sides, seconds, bar)
    assert full.ratio == Spread(1, 1, 1) and full.bar is None
    assert norm.ratio == Spread(0.5, 0.5, 0.6)
    assert norm.value == Spread(600, 500, 5000)
    assert norm.best == 0.5 and norm.samples == 3
    assert norm.bar == 0.64 and not norm.missed


def test_bars() -> None:
    assert bar("forward", "4096 tokens", "norm") == 0.64
    assert bar("forward", "4096 tokens", "lsh") == 0.70
    assert bar("forward", "128 tokens", "lsh") == 1.03
    assert bar("forward", "2048 tokens", "norm") is None
    assert bar("attention", "4096 tokens", "local-attention") is None
    assert bar("memory", "8192 to 32768 tokens", "norm") == 4.4


def made_up(ratio: float, case: str = "4096 tokens") -> Record:
    spread = Spread(ratio, ratio, ratio)
    return Record("made up", case, "norm", spread, ratio, spread, "ms", 1, bar=0.75)


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
    made = Comparison(lambda options: iter([[made_up(ratio)]]), 0)
    monkeypatch.setitem(COMPARISONS, "made-up", made)
    path = tmp_path / "results.json"
    assert main(["made-up", "--json", str(path), *(["--check"] if check else [])]) == code
    (record,) = store.read(path)
    assert record["missed"] == (ratio > 0.75)
    assert ("MISSED" in capsys.readouterr().out) == (ratio > 0.75)


def test_the_best_ratio_may_be_held_to_the_bar() -> None:
    noisy = replace(made_up(0.9), best=0.7)
    assert noisy.missed and not replace(noisy, is_best_held=True).missed
    assert replace(noisy, best=0.8, is_best_held=True).missed


def test_the_table_is_aligned() -> None:
    lines = render([made_up(0.5), made_up(12.25)]).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_results_are_merged_case_by_case(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    here, there = {"threads": 1}, {"threads": 2}
    store.merge(path, [made_up(0.1, "a"), made_up(0.2, "b")], here)
    store.merge(path, [made_up(0.3, "b"), made_up(0.4, "c")], there)
    store.merge(path, [made_up(0.5, "d")], here)
    assert found(path) == [
        (here, {"a": 0.1, "d": 0.5}),
        (there, {"b": 0.3, "c": 0.4}),
    ]
    store.merge(path, [made_up(0.6, "a"), made_up(0.7, "d")], there)
    assert found(path) == [(there, {"b": 0.3, "c": 0.4, "a": 0.6, "d": 0.7})]
    assert [record["case"] for record in store.read(path)] == ["b", "c", "a", "d"]


def found(path: Path) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """The conditions of each run in a file, and its ratios by case."""
    runs = json.loads(path.read_text())["runs"]
    return [
        (run["conditions"], {r["case"]: r["ratio"]["median"] for r in run["records"]})
        for run in runs
    ]


def measured(tmp_path: Path, *argv: str) -> dict[str, list[dict[str, Any]]]:
    """The records of a quick measurement, by case."""
    path = tmp_path / "results.json"
    assert main([*argv, "--layers", "1", "--repeats", "1", "--json", str(path)]) == 0
    cases: dict[str, list[dict[str, Any]]] = {}
    for record in store.read(path):
        cases.setdefault(record["case"], []).append(record)
    return cases


def test_forward(tmp_path: Path) -> None:
    cases = measured(tmp_path, "forward", "--lengths", "16", "300")
    assert set(cases) == {"16 tokens", "300 tokens"}
    for records in cases.values():
        assert len(records) == 8
        assert [r["side"] for r in records[:3]] == ["full (sdpa)", "norm", "pooling"]


def test_memory_is_held_to_the_ratio_of_the_lengths(tmp_path: Path) -> None:
    argv = ("memory", "--selections", "norm", "none", "--lengths", "1024", "2048")
    norm, none = measured(tmp_path, *argv)["1024 to 2048 tokens"]
    assert (norm["side"], none["side"]) == ("norm", "none")
    assert 1.3 < norm["ratio"]["median"] < 2.1  # 4 if it were quadratic


def test_growth_has_as_many_tokens_on_both_sides(tmp_path: Path) -> None:
    cases = measured(tmp_path, "growth", "--lengths", "512", "2048")
    assert [[r["side"] for r in records] for records in cases.values()] == [
        ["4 of 512", "1 of 2048"],
        ["1 of 512", "1 of 2048"],
    ]
    short, long = cases["512 to 2048 tokens, norm, memory"]
    assert long["ratio"]["median"] == long["value"]["median"] / short["value"]["median"] / 4
    # 4 if it were quadratic; less than 1 since a workspace is as large for the short one
    assert 0.4 < long["ratio"]["median"] < 1.1


def test_ragged_batches_hold_the_tokens_of_their_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens: list[list[int]] = []
    run = comparisons.run

    def counting(model: torch.nn.Module, *batches: dict[str, torch.Tensor]) -> None:
        tokens.append([int(n) for batch in batches for n in batch["attention_mask"].sum(1)])
        run(model, *batches)

    monkeypatch.setattr(comparisons, "run", counting)
    (records,) = measured(tmp_path, "ragged", "--lengths", "20", "300").values()
    assert [r["side"] for r in records] == ["one by one", "by default", "unpad=False"]
    assert all(lengths == [20, 60, 100, 140, 180, 220, 260, 300] for lengths in tokens)


def test_training_is_held_to_each_reference(tmp_path: Path) -> None:
    cases = measured(tmp_path, "train", "--lengths", "64")
    assert {case: [r["side"] for r in records] for case, records in cases.items()} == {
        f"64 tokens, to {name}": [name, "norm"] for name in ("full (sdpa)", "BigBird", "Longformer")
    }


def test_eager_and_compiled_models_are_measured_in_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "BACKEND", "eager")  # inductor takes minutes
    cases = measured(tmp_path, "compile", "--lengths", "64", "300")
    assert {case: [r["side"] for r in records] for case, records in cases.items()} == {
        f"{length} tokens, to full (sdpa){kind}": [f"full (sdpa){kind}", f"norm{kind}"]
        for length in (64, 300)
        for kind in ("", ", compiled")
    }


def test_onnx_is_left_out_where_it_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exporting, "PACKAGES", ("torch", "not_there"))
    assert main(["onnx", "--json", str(tmp_path / "results.json")]) == 0
    assert "onnx is left out: not_there is not installed" in capsys.readouterr().err


def test_peers_are_measured_in_time_and_memory_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = ("--lengths", "64", "128")
    cases = measured(tmp_path, "peers", "attention", *lengths)
    records = [record for case in cases.values() for record in case]
    names = {"full (sdpa)", "norm", *peers.available()}
    for comparison in ("peers", "peers' memory"):
        sides = [r["side"] for r in records if r["comparison"] == comparison]
        assert len(sides) == 2 * len(names) and set(sides) == names
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed; `tox -e ratios` has it")
    capsys.readouterr()
    assert main(["plots", "--json", str(tmp_path / "results.json")]) == 0
    drawn = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in drawn] == [
        f"results-{name}.png" for name in ("peers-time", "peers-memory", "floor")
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_peers_that_are_not_there_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(peers.PEERS, "Gone", peers.Peer(peers.eager, "GoneModel"))
    assert "Gone" not in peers.available()
    said = f"Gone is left out: transformers {transformers.__version__} does not have it\n"
    assert said in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert peers.local_attention(128) is None
    assert "local-attention is left out: it is not installed" in capsys.readouterr().err


def test_the_regression_check_counts_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, clocks = set(), set()
    real = comparisons.time_sides

    def watching(sides: Any, rounds: Rounds, clock: Any) -> Any:
        threads.add(torch.get_num_threads())
        clocks.add(clock)
        return real(sides, rounds, clock)

    monkeypatch.setattr(comparisons, "time_sides", watching)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        cases = measured(tmp_path, "regression", "--lengths", "64", "300", "512")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert (threads, clocks) == ({1}, {time.process_time})
    [run] = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert run["conditions"]["threads"] == 1
    assert set(cases) == {
        "forward, 64 tokens",
        "attention, 300 tokens",
        "memory, 64 to 512 tokens",
    }
    assert all(r["is_best_held"] for records in cases.values() for r in records)


def test_every_bar_is_of_a_comparison_at_its_own_lengths() -> None:
    """A bar whose case is not measured holds nothing."""
    for comparison, case, side in BARS:
        of = COMPARISONS[comparison]
        named = {int(number) for number in re.findall(r"\d{3,}(?! texts)", case)}
        same = [other.lengths for other in COMPARISONS.values() if other.run is of.run]
        assert named <= {length for lengths in same for length in lengths}, case
        longest = max(of.lengths, default=0)
        assert side in {"*", "by default", "local-attention", f"1 of {longest}", *of.selections}


def test_a_gpu_is_measured_forward_and_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparisons, "GPU", torch.device("cpu"))
    cases = measured(tmp_path, "gpu", "--lengths", "300")
    assert {case: [r["side"] for r in records] for case, records in cases.items()} == {
        f"300 tokens, {what}": ["full (sdpa)", "norm"]
        for what in ("forward", "forward, memory", "training step", "training step, memory")
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it would be measured")
def test_no_gpu_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", "--json", str(tmp_path / "results.json")]) == 0
    assert "gpu is left out: there is no cuda device" in capsys.readouterr().err


def test_help_says_what_each_comparison_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(comparison.summary in said for comparison in COMPARISONS.values())
    assert sum(COMPARISONS[name].minutes for name in QUICK) <= 5
