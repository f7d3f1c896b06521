"""`python -m benchmarks`: run comparisons, print them, write them down, hold them to their bars."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.comparisons import COMPARISONS, QUICK, Options
from benchmarks.harness import Record, Rounds, render
from benchmarks.models import SELECTIONS


def environment() -> dict[str, Any]:
    """What the numbers depend on, apart from the code."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def build_parser() -> argparse.ArgumentParser:
    defaults = Options()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "comparisons",
        nargs="*",
        metavar="COMPARISON",
        help=f"of {', '.join(COMPARISONS)} (default: {', '.join(QUICK)}); or plots, of --json's",
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=defaults.lengths, metavar="T")
    parser.add_argument(
        "--selections",
        nargs="+",
        choices=SELECTIONS,
        metavar="NAME",
        help=f"of {', '.join(SELECTIONS)} (default: all for time, norm for memory)",
    )
    parser.add_argument("--layers", type=int, default=defaults.layers)
    parser.add_argument(
        "--repeats", type=int, metavar="N", help="rounds of each case (default: by its duration)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results there too")
    parser.add_argument("--check", action="store_true", help="exit code 1 if a bar is missed")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.comparisons == ["plots"]:
        from benchmarks.plots import draw

        if args.json is None:
            parser.error("plots are drawn of results: give them by --json")
        for path in draw(args.json):
            print(path)
        return 0
    names = args.comparisons or list(QUICK)
    unknown = [name for name in names if name not in COMPARISONS]
    if unknown:
        parser.error(f"no comparison {', '.join(unknown)}; there are {', '.join(COMPARISONS)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    defaults = Options()
    rounds = defaults.rounds
    if args.repeats:
        rounds = Rounds(least=args.repeats, most=args.repeats)
    options = Options(
        lengths=tuple(args.lengths),
        selections=tuple(args.selections or defaults.selections),
        memory_selections=tuple(args.selections or defaults.memory_selections),
        layers=args.layers,
        rounds=rounds,
    )

    records: list[Record] = []
    for name in names:
        for found in COMPARISONS[name](options):
            records += found
            print(f"{name}, {found[0].case}: done", file=sys.stderr)
    print(render(records))
    missed = [record for record in records if record.missed]
    if args.json:
        report = {
            "environment": environment(),
            "layers": options.layers,
            "records": [asdict(r) | {"missed": r.missed} for r in records],
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if args.check and missed:
        for r in missed:
            what = f"{r.comparison}, {r.case}, {r.side}"
            print(
                f"missed: {what}: {r.ratio.median:.2f} (best {r.best:.2f}), at most {r.bar}",
                file=sys.stderr,
            )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
