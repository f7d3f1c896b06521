"""The commands. Each imports what else is heavy when it runs."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
from rich.console import Console
from rich.table import Table

from lsg_patch.config import KEY, LSGConfig

DISTRIBUTION = "lsg-patch"
app = typer.Typer(
    help="Long inputs for encoders that are already loaded.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    epilog="`--debug` with any command shows where an error came from.",
)

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, or a repository of the hub.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
MaxLength = Annotated[
    int, typer.Option("--max-length", min=1, help="Tokens that the patched model reads.")
]


def _version(asked: bool) -> None:
    if not asked:
        return
    try:
        print(f"{DISTRIBUTION} {metadata.version(DISTRIBUTION)}")
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        print(f"{DISTRIBUTION} (not installed)")
    raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


def _sentences() -> dict[str, str]:
    """What the docstring of ``LSGConfig`` says of each setting, its first sentence."""
    found = re.findall(r"^ {8}(\w+): (.*?)(?=^ {8}\w+:|\n\n)", LSGConfig.__doc__ or "", re.M | re.S)
    return {name: re.split(r"(?<=[a-z)])[.:;] ", " ".join(text.split()))[0] for name, text in found}


def with_settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command with the settings of ``LSGConfig`` as options; it gets those given as ``settings``."""
    told, types = _sentences(), get_type_hints(LSGConfig)
    names = [field.name for field in fields(LSGConfig) if field.name != "max_position_embeddings"]

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        chosen = {name: value for name in names if (value := given.pop(name)) is not None}
        period = chosen.get("position_period")
        if isinstance(period, str) and period.isdigit():
            chosen["position_period"] = int(period)
        return command(**given, settings=chosen)

    *parameters, settings = inspect.signature(command, eval_str=True).parameters.values()
    for name in names:
        option = typer.Option(help=told.get(name), rich_help_panel="Settings, as in LSGConfig")
        kind: Any = types[name] | None
        # text for a choice of types
        annotation: Any = Annotated[kind if len(get_args(kind)) == 2 else str | None, option]
        parameters.append(settings.replace(name=name, default=None, annotation=annotation))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


@app.command(epilog="Example: `lsg-patch demo --max-length 2048 --sparsity-type pooling`")
def demo(
    model: Annotated[
        str | None,
        typer.Option(
            help="An encoder that transformers loads; by default that of the extra `demo`."
        ),
    ] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option(help="A text as one more document; `--documents 0` leaves only these."),
    ] = None,
    documents: Annotated[
        int, typer.Option(min=0, help="Documents of the standard library's documentation.")
    ] = 90,
    max_length: MaxLength = 4096,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens a block.")] = 128,
    sparsity_type: Annotated[str, typer.Option(help="How sparse tokens are chosen.")] = "norm",
    as_json: Json = False,
) -> None:
    """See a real encoder find passages in long documents: as it is, patched, and reverted."""
    from lsg_patch import demo as demonstration

    config = LSGConfig(block_size, sparsity_type, max_position_embeddings=max_length)
    report = demonstration.measure(model, file or (), documents, config)
    print(json.dumps(report, indent=2) if as_json else demonstration.render(report))
    raise typer.Exit(0 if report["reverted_bit_for_bit"] else 1)


@app.command(epilog="Example: `lsg-patch families --markdown`")
def families(
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """List the models that can be patched."""
    from lsg_patch.families import table

    if as_json and markdown:
        raise typer.BadParameter("--json and --markdown: choose one")
    print(table.as_json() if as_json else table.as_markdown() if markdown else table.as_text())


@app.command("inspect", epilog="Example: `lsg-patch inspect roberta-base --max-length 8192`")
@with_settings
def inspect_model(
    model: Model, max_length: MaxLength = 4096, as_json: Json = False, *, settings: dict[str, Any]
) -> None:
    """Say what a patch would change in a model, and from which length it pays."""
    from lsg_patch.costs import overview

    found = overview(*_load(model), LSGConfig(max_position_embeddings=max_length, **settings))
    if as_json:
        print(json.dumps(found, indent=2))
        return
    costs = found.pop("costs")
    _print_table("", [{"": name.replace("_", " "), " ": str(x)} for name, x in found.items()])
    _print_table("of full attention", costs)


@app.command(
    epilog="Example: `lsg-patch convert bert-base-uncased long-bert --max-length 4096 --test`"
)
@with_settings
def convert(
    source: Annotated[str, typer.Argument(help="A folder, or a repository of the hub.")],
    out: Annotated[Path, typer.Argument(help="The folder to write, new or empty.")],
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens; by default 4096, or the source's own.")
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(help="A class; by default that of the source's config.")
    ] = None,
    keep_first_global_token: Annotated[
        bool, typer.Option("--keep-first-global-token", help="Of a source that is patched already.")
    ] = False,
    resize_lsg: Annotated[
        bool, typer.Option("--resize-lsg", help="Keep all global tokens of a patched source.")
    ] = False,
    use_token_ids: Annotated[
        bool, typer.Option(help="Give new global tokens the first token type.")
    ] = True,
    test: Annotated[
        bool, typer.Option("--test", help="Compare a short input's outputs, and read a long one.")
    ] = False,
    *,
    settings: dict[str, Any],
) -> None:
    """Save a checkpoint patched for long inputs, with its tokenizer."""
    given = dict(locals())  # a copy: a debugger fills the frame's own again
    from lsg_patch.conversion import convert as convert_checkpoint

    _without_bars()
    del given["settings"]
    done = convert_checkpoint(**given, **settings)
    print("\n".join(done.lines))
    raise typer.Exit(0 if done.passed else 1)


@app.command(epilog="Example: `lsg-patch export long-bert long-bert.onnx --int8`")
@with_settings
def export(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The file to write.")],
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens; by default 4096, or the model's own.")
    ] = None,
    opset: Annotated[int | None, typer.Option(help="Of ONNX, 18 or later.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Write one of 8 bits beside it.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    *,
    settings: dict[str, Any],
) -> None:
    """Write a model as ONNX for all lengths, checked by onnxruntime."""
    given = dict(locals())  # a copy: a debugger fills the frame's own again
    from lsg_patch.exporting import export_checkpoint

    _without_bars()
    done = export_checkpoint(given.pop("model"), **given)
    print(f"{done.path}: largest difference from the model's outputs {done.difference:.1e}")
    if done.int8_path is not None:
        print(
            f"{done.int8_path}: cosine to those outputs {done.mean_cosine:.4f} in the mean, "
            f"{done.least_cosine:.4f} at least"
        )


@app.command(epilog="Example: `lsg-patch plot pattern.png --length 1024 --sparsity-type lsh`")
@with_settings
def plot(
    out: Annotated[Path, typer.Argument(help="The picture to write, .png or .svg.")],
    model: Annotated[
        str | None, typer.Option(help="Whose attention; by default one of random numbers.")
    ] = None,
    length: Annotated[int, typer.Option(min=1, help="Tokens of the picture.")] = 512,
    layer: Annotated[int, typer.Option(min=0)] = 0,
    head: Annotated[int, typer.Option(min=0)] = 0,
    query: Annotated[int | None, typer.Option(help="Only what this token sees.")] = None,
    cost: Annotated[
        bool, typer.Option("--cost", help="The cost against the length instead.")
    ] = False,
    *,
    settings: dict[str, Any],
) -> None:
    """Draw who attends to whom, or what it costs."""
    from lsg_patch import plots
    from lsg_patch.patching import is_patched, patch_model

    if not out.suffix:  # matplotlib would choose one, and write beside a folder of this name
        raise ValueError(f"out={str(out)!r} is no name of a picture: let it end in .png or .svg")
    config = LSGConfig(max_position_embeddings=max(length, 4096), **settings)
    if cost:
        axes = plots.plot_cost(config, [2**n for n in range(7, 17)])
    else:
        of: Any = config
        if model is not None:
            of, tokenizer = _load(model, settings)
            if not is_patched(of):
                patch_model(of, config, tokenizer=tokenizer)
        axes = plots.plot_pattern(of, length, layer, head, query)
    figure: Any = axes.figure
    figure.savefig(out, dpi=160, bbox_inches="tight")
    print(out)


@app.command(epilog="Example: `lsg-patch tune bert-base-uncased --file texts/ --max-length 2048`")
def tune(
    model: Model,
    file: Annotated[
        list[Path],
        typer.Option(help="A text, a folder of .txt, or a .jsonl with `text`; may be repeated."),
    ],
    max_length: MaxLength = 4096,
    chunk_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="A vector for each so many tokens; by default one for a text."),
    ] = None,
    queries: Annotated[int, typer.Option(min=1, help="Passages of each text.")] = 4,
    limit: Annotated[int, typer.Option(min=2, help="Texts that are read, the first ones.")] = 100,
    as_json: Json = False,
) -> None:
    """Say which settings find most in your own texts, without labels.

    By the mean of the outputs, or by the own pooling of a SentenceTransformer.
    """
    from lsg_patch import tuning
    from lsg_patch.holders import tokenizer_in

    texts = tuning.read_texts(file)[:limit]
    encoder, tokenizer = _load_encoder(model)
    rows = tuning.tune(encoder, tokenizer, texts, max_length, chunk_tokens, queries)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    title = f"{rows[0]['queries']} passages look for their texts, of {len(texts)}; intervals of 95%"
    _print_table(title, [tuning.cells(row) for row in rows])
    print("\n".join(tuning.verdict(rows, has_tokenizer=tokenizer_in(encoder) is not None)))


@app.command(epilog="Example: `lsg-patch bench roberta-base --length 1024 --length 4096`")
@with_settings
def bench(
    model: Model,
    length: Annotated[list[int] | None, typer.Option(min=1, help="May be repeated.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds, both sides in turn.")] = 5,
    as_json: Json = False,
    *,
    settings: dict[str, Any],
) -> None:
    """Time a model's forward with LSG attention against full attention, on this machine."""
    from lsg_patch.costs import time_forwards

    lengths = length or [512, 1024, 2048, 4096]
    config = LSGConfig(max_position_embeddings=max(lengths), **settings)
    found = time_forwards(*_load(model), config, lengths, repeats)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print_table("milliseconds of a forward, batch 1", found)


def _load(name: str, settings: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """A model without its head, and its tokenizer (None where there is none).

    One that was saved patched is patched, with other ``settings`` if given. None: it is refused.
    """
    from transformers import AutoModel

    from lsg_patch.checkpoints import load_any
    from lsg_patch.tokenizer import tokenizer_at

    is_saved = _was_saved_patched(name, may_be=settings is not None)
    _without_bars()
    try:
        if is_saved:
            return load_any(name, AutoModel, **(settings or {})).eval(), tokenizer_at(name)[0]
        return AutoModel.from_pretrained(name).eval(), tokenizer_at(name)[0]
    except Exception as error:  # a wrong config fails anywhere in transformers
        raise ValueError(f"cannot load {name!r}: {type(error).__name__}: {error}") from error


def _was_saved_patched(name: str, may_be: bool = False) -> bool:
    """Whether a checkpoint was, by us or by the reference.

    Raises:
        ValueError: it was, and ``may_be`` is False.
    """
    from lsg_patch.published import as_ours, is_published
    from lsg_patch.weights import Source

    try:
        stated = Source.of(name, {}).config()
    except (OSError, ValueError):
        return False  # what loads it says what is wrong
    saved = (as_ours(stated) if is_published(stated) else stated).get(KEY)
    if saved is not None and not may_be:
        names = ("block_size", "num_global_tokens", "sparsity_type", "sparse_block_size")
        told = ", ".join(f"{x}={saved.get(x)!r}" for x in (*names, "sparsity_factor"))
        raise ValueError(
            f"{name!r} was saved patched, with {told}: name the checkpoint that it was made of"
        )
    return saved is not None


def _load_encoder(name: str) -> tuple[Any, Any]:
    """A SentenceTransformer and its tokenizer where ``name`` is one, else what ``_load`` gives."""
    from lsg_patch.weights import Source

    if Source.of(name, {}).find("modules.json") is None:
        return _load(name)
    _was_saved_patched(name)
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            f"{name!r} is a SentenceTransformer: pip install sentence-transformers"
        ) from error
    _without_bars()
    try:
        encoder = SentenceTransformer(name)
    except Exception as error:  # a wrong config fails anywhere in its modules
        raise ValueError(f"cannot load {name!r}: {type(error).__name__}: {error}") from error
    return encoder, encoder.tokenizer


def _without_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def _print_table(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title, show_header=any(name.strip() for name in rows[0]), box=None)
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="left" if not name.strip() else "right")
    for row in rows:
        table.add_row(*(f"{x:,}" if isinstance(x, int) else str(x) for x in row.values()))
    Console().print(table)
