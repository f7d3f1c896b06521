"""`python -m benchmarks`: run comparisons, print them, write them down, hold them to their bars."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.comparisons import COMPARISONS, QUICK, Comparison
from benchmarks.harness import Options, Record, Rounds, render
from benchmarks.models import SELECTIONS
from benchmarks.store import conditions, merge


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=_overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "comparisons",
        nargs="*",
        metavar="COMPARISON",
        help=f"of those below (default: {' '.join(QUICK)}); or plots, of --json's results; or quality "
        "(its own --help)",
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", metavar="T", help="tokens, in place of a comparison's own"
    )
    parser.add_argument(
        "--selections",
        nargs="+",
        choices=SELECTIONS,
        metavar="NAME",
        help=f"of {', '.join(SELECTIONS)}",
    )
    parser.add_argument(
        "--layers", type=int, metavar="N", help="of the models, in place of a comparison's own"
    )
    parser.add_argument(
        "--repeats", type=int, metavar="N", help="rounds of each case (default: by its duration)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch")
    parser.add_argument(
        "--own-seconds",
        action="store_true",
        help="count the seconds of this process, on all its threads: other work disturbs them less",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        help="write the results there; those of other comparisons and cases stay",
    )
    parser.add_argument("--check", action="store_true", help="exit code 1 if a bar is missed")
    return parser


def _overview() -> str:
    """The comparisons as a table: what they measure, where, and how long that takes."""
    lines = ["comparisons, with their lengths, selections and about how long they take on 2 cores:"]
    for name, of in COMPARISONS.items():
        chosen = "all" if of.selections == SELECTIONS else " ".join(of.selections)
        where = "; ".join(
            filter(None, (" ".join(map(str, of.lengths)), chosen, f"{of.minutes:g} min"))
        )
        lines += [f"  {name:<11} {of.summary}", f"  {'':<11} ({where})"]
    return "\n".join(lines)


def _options(comparison: Comparison, args: argparse.Namespace) -> Options:
    """What a comparison is to do: its own choice where the command line says nothing."""
    return Options(
        lengths=tuple(args.lengths or comparison.lengths),
        selections=tuple(args.selections or comparison.selections),
        layers=args.layers or comparison.layers,
        rounds=Rounds(least=args.repeats, most=args.repeats) if args.repeats else comparison.rounds,
        clock=time.process_time if args.own_seconds else time.perf_counter,
    )


def main(argv: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else list(argv)
    if given[:1] == ["quality"]:
        from benchmarks import quality

        return quality.main(given[1:])
    parser = build_parser()
    args = parser.parse_args(given)
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

    records: list[Record] = []
    for name in names:
        comparison = COMPARISONS[name]
        options = _options(comparison, args)
        for found in comparison.run(options):
            records += found
            if args.json:
                merge(args.json, found, conditions(options.layers))
            print(f"{name}, {found[0].case}: done", file=sys.stderr)
    print(render(records))
    missed = [record for record in records if record.missed]
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
