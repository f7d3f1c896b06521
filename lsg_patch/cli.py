"""The command line: one table of sub-commands, each with its own arguments and its own run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["main"]

DISTRIBUTION = "lsg-patch"


@dataclass(frozen=True)
class Command:
    """A sub-command. `run` imports what is heavy, so that `--help` is quick."""

    name: str
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _at_least(minimum: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be {minimum} or more, not {value}")
        return value

    return number


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Looks for passages from the middle of long documents, with an encoder that was made for "
        "short ones: first as it is, truncating each document, then patched. Afterwards the patch "
        "is taken back and the first outputs are compared with the last."
    )
    parser.add_argument(
        "--model",
        metavar="NAME_OR_PATH",
        help="any encoder that transformers can load (default: the one of the extra `demo`)",
    )
    parser.add_argument(
        "--file",
        metavar="PATH",
        dest="files",
        action="append",
        type=Path,
        default=[],
        help="a text file as one more document; may be repeated, and `--documents 0` leaves only "
        "these",
    )
    parser.add_argument(
        "--documents",
        metavar="N",
        type=_at_least(0),
        default=90,
        help="number of documents made from the standard library's documentation (default: 90)",
    )
    parser.add_argument(
        "--max-length",
        metavar="TOKENS",
        type=_at_least(1),
        default=4096,
        help="tokens of a document that the patched model reads (default: 4096)",
    )
    parser.add_argument("--block-size", metavar="TOKENS", type=_at_least(1), default=128)
    parser.add_argument(
        "--sparsity-type",
        metavar="NAME",
        default="norm",
        help="norm (default), pooling, lsh, stride, block_stride, bos_pooling or none",
    )
    parser.add_argument("--json", action="store_true", help="print JSON and no progress bar")


def _demo(args: argparse.Namespace) -> int:
    from lsg_patch import demo

    return demo.run(
        demo.DemoOptions(
            model=args.model,
            files=tuple(args.files),
            documents=args.documents,
            max_length=args.max_length,
            block_size=args.block_size,
            sparsity_type=args.sparsity_type,
            json=args.json,
        )
    )


def _families_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "The model families that can be patched, from the registry."
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")


def _families(args: argparse.Namespace) -> int:
    from lsg_patch.families import table

    form = table.as_json if args.json else table.as_markdown if args.markdown else table.as_text
    print(form())
    return 0


def _number_or_name(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


# settings of LSGConfig, and their types; those that are not given are its defaults
SETTINGS: dict[str, Callable[[str], Any]] = {
    "block_size": int,
    "sparsity_type": str,
    "sparse_block_size": int,
    "sparsity_factor": int,
    "num_global_tokens": int,
    "positions": str,
    "position_period": _number_or_name,
    "mask_first_token": bool,
    "pool_with_global": bool,
    "adaptive": bool,
    "unpad": bool,
    "lsh_num_pre_rounds": int,
    "pass_global_tokens_to_decoder": bool,
    "attention_probs_dropout_prob": float,
    "global_positional_stride": int,
    "random_global_init": bool,
    "backend": str,
    "seed": int,
}
_FLAGS = {
    "keep_first_global_token": "keep the first global token of a source that is patched already",
    "resize_lsg": "keep all global tokens of a source that is patched already",
    "test": "compare a short input's outputs with the source's, and read a long one",
}


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Makes a checkpoint one of long inputs and saves it with its tokenizer; from_pretrained of "
        "lsg_patch loads it. A checkpoint that was saved patched, by us or by the reference, is saved "
        "in our format."
    )
    parser.add_argument("source", metavar="SOURCE", help="a folder, or a repository of the hub")
    parser.add_argument("out", metavar="OUT", help="the folder to write, new or empty")
    parser.add_argument(
        "--max-length",
        metavar="TOKENS",
        type=_at_least(1),
        help="default: 4096, or the source's own",
    )
    parser.add_argument(
        "--architecture", metavar="CLASS", help="default: that of the source's config"
    )
    for name, summary in _FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=summary)
    yes_or_no = argparse.BooleanOptionalAction
    parser.add_argument(
        "--use-token-ids",
        action=yes_or_no,
        default=True,
        help="whether new global tokens have the first token type",
    )
    settings = parser.add_argument_group("settings, as in LSGConfig")
    for name, kind in SETTINGS.items():
        how: dict[str, Any] = {"action": yes_or_no} if kind is bool else {"type": kind}
        if kind is not bool:
            how["metavar"] = "RATE" if kind is float else "NAME" if kind is str else "N"
        settings.add_argument(f"--{name.replace('_', '-')}", default=None, **how)


def _convert(args: argparse.Namespace) -> int:
    from lsg_patch import conversion

    names = ("max_length", "architecture", "use_token_ids", *_FLAGS)
    given = {name: getattr(args, name) for name in names}
    given |= {name: x for name in SETTINGS if (x := getattr(args, name)) is not None}
    try:
        done = conversion.convert(args.source, args.out, **given)
    except (OSError, TypeError, ValueError) as error:
        print(f"{DISTRIBUTION} convert: {error}", file=sys.stderr)
        return 2
    print("\n".join(done.lines))
    return 0 if done.passed else 1


COMMANDS = (
    Command("demo", "see a real encoder read long documents", _demo_arguments, _demo),
    Command("convert", "save a checkpoint patched for long inputs", _convert_arguments, _convert),
    Command("families", "list the models that can be patched", _families_arguments, _families),
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=DISTRIBUTION, description="Long inputs for encoders that are already loaded."
    )
    parser.add_argument("--version", action="version", version=f"{DISTRIBUTION} {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = commands.add_parser(command.name, help=command.summary)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


def _version() -> str:
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return "(not installed)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code is 0, or 1 for a failed check, or 2 for a wrong request."""
    args = build_parser().parse_args(argv)
    code: int = args.run(args)
    return code
