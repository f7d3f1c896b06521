"""The command line itself; what its commands do is tested with them."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import transformers

import lsg_patch
from lsg_patch import LSGConfig, cli, plots
from lsg_patch.families import FAMILIES
from tests import published
from tests.models import tiny_model
from tests.tokenizers import real_tokenizer

COMMANDS = ("demo", "families", "inspect", "convert", "export", "plot", "bench", "tune")


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model("bert", transformers.BertForMaskedLM).save_pretrained(folder)
    real_tokenizer(folder)
    return folder


def test_version(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: f"1.2.3 of {name}")
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == "lsg-patch 1.2.3 of lsg-patch"


def test_version_of_a_source_tree(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert run("--version") == 0
    assert "not installed" in capsys.readouterr().out


def test_help_names_every_command(capsys: Any) -> None:
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_has_an_example(command: str, capsys: Any) -> None:
    assert run(command, "--help") == 0
    out = capsys.readouterr().out
    assert f"lsg-patch {command}" in out


def test_every_setting_is_an_option_and_explained(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert run("convert", "--help") == 0
    out = capsys.readouterr().out
    for name in vars(LSGConfig()):
        if name != "max_position_embeddings":  # that is --max-length
            assert f"--{name.replace('_', '-')}" in out
    assert "tokens a block" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["demo", "--documents", "-1"],
        ["demo", "--max-length", "many"],
        ["families", "--json", "--markdown"],
        ["inspect"],
        ["inspect", "/no/such/folder"],
        ["inspect", "CHECKPOINT", "--block-size", "0"],
        ["inspect", "CHECKPOINT", "--sparsity-type", "dense"],
        ["inspect", "CHECKPOINT", "--max-length", "0"],
        ["convert", "CHECKPOINT"],
        ["convert", "CHECKPOINT", "CHECKPOINT"],
        ["convert", "/no/such/folder", "OUT"],
        ["convert", "CHECKPOINT", "OUT", "--seed", "-1"],
        ["export", "/no/such/folder", "OUT"],
        [
            "export",
            "CHECKPOINT",
            "OUT",
            "--opset",
            "17",
            "--block-size",
            "16",
            "--num-global-tokens",
            "0",
        ],
        ["plot", "OUT.png", "--model", "CHECKPOINT", "--layer", "9"],
        ["plot", "OUT.png", "--head", "9"],
        ["plot", "OUT.png", "--length", "64", "--query", "64"],
        ["plot", "OUT.of-no-kind"],
        ["plot", "OUT"],
        ["plot", "CHECKPOINT"],  # a folder
        ["bench", "CHECKPOINT", "--length", "0"],
        ["tune", "CHECKPOINT"],
        ["tune", "CHECKPOINT", "--file", "/no/such/file"],
        ["tune", "CHECKPOINT", "--file", "CHECKPOINT", "--limit", "1"],
        ["tune", "CHECKPOINT", "--file", "CHECKPOINT"],  # one file of short words
        ["tune", "/no/such/folder", "--file", "CHECKPOINT"],
    ],
    ids=" ".join,
)
def test_a_wrong_request_is_told_of_and_changes_nothing(
    arguments: list[str], checkpoint: Path, tmp_path: Path, capsys: Any
) -> None:
    before = sorted((file.name, file.stat().st_mtime_ns) for file in checkpoint.iterdir())
    places = {"CHECKPOINT": checkpoint, "OUT": tmp_path / "out", "OUT.png": tmp_path / "out.png"}
    places["OUT.of-no-kind"] = tmp_path / "out.of-no-kind"
    assert run(*(places.get(argument, argument) for argument in arguments)) == 2
    told = capsys.readouterr().err
    assert told.strip()
    assert "Traceback" not in told
    if "Usage" not in told:
        assert told.startswith("lsg-patch: ")
        assert told.count("\n") == 1
    assert sorted((file.name, file.stat().st_mtime_ns) for file in checkpoint.iterdir()) == before
    assert not list(tmp_path.iterdir())


def test_debug_raises(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="block_size must be"):
        run("inspect", checkpoint, "--block-size", "0", "--debug")


def test_families(capsys: Any) -> None:
    assert run("families", "--json") == 0
    assert {row["family"] for row in json.loads(capsys.readouterr().out)} == set(FAMILIES)


def test_inspect(checkpoint: Path, capsys: Any) -> None:
    assert run("inspect", checkpoint, "--max-length", 256, "--block-size", 16, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["family"], found["positions"], found["positions_patched"]) == ("bert", 64, 256)
    assert found["parameters_added"] == (256 - 64) * 32 + 32
    assert run("inspect", checkpoint, "--block-size", 16) == 0
    assert "65,536" in capsys.readouterr().out


def test_bench(checkpoint: Path, capsys: Any) -> None:
    arguments = ("--length", 64, "--length", 96, "--repeats", 1, "--block-size", 16, "--json")
    assert run("bench", checkpoint, *arguments, "--sparse-block-size", 16) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["tokens"] for row in found] == [64, 96]
    assert all(row["full"] > 0 and row["patched"] > 0 for row in found)


@pytest.mark.parametrize("kind", ["ours", "published"])
def test_what_was_saved_patched_is_not_taken_for_an_unpatched_model(
    kind: str, tmp_path: Path, capsys: Any
) -> None:
    """Drawn as it was saved; the commands that patch it themselves name the settings, and the mend."""
    model = lsg_patch.patch_model(tiny_model("bert"), 16, sparse_block_size=16, num_global_tokens=2)
    folder, texts = tmp_path / kind, tmp_path / "texts.jsonl"
    if kind == "ours":
        model.save_pretrained(folder)
    else:
        published.write(model, folder)
    texts.write_text('{"text": "a"}\n{"text": "b"}\n')
    for arguments in (
        ("inspect", folder),
        ("bench", folder, "--length", 32),
        ("tune", folder, "--file", texts),
    ):
        assert run(*arguments) == 2
        told = capsys.readouterr().err
        assert "was saved patched, with block_size=16, num_global_tokens=2, sparsity_type" in told
        assert "name the checkpoint that it was made of" in told
    for more in ({}, {"sparsity_type": "none"}):
        given = [f"--sparsity-type={x}" for x in more.values()]
        assert run("plot", tmp_path / "drawn.png", "--model", folder, "--length", 100, *given) == 0
        axes = plots.plot_pattern(lsg_patch.from_pretrained(folder, **more), 100)
        axes.figure.savefig(tmp_path / "wanted.png", dpi=160, bbox_inches="tight")
        drawn, wanted = ((tmp_path / f"{x}.png").read_bytes() for x in ("drawn", "wanted"))
        assert drawn == wanted


@pytest.mark.parametrize("more", [[], ["--model", "CHECKPOINT"], ["--cost"]], ids=str)
def test_plot(checkpoint: Path, tmp_path: Path, more: list[str], capsys: Any) -> None:
    own = [checkpoint if argument == "CHECKPOINT" else argument for argument in more]
    out = tmp_path / "picture.png"
    arguments = ("--length", 60, "--block-size", 8, "--sparse-block-size", 8)
    assert run("plot", out, *own, *arguments) == 0
    assert out.read_bytes()[:4] == b"\x89PNG"
    assert capsys.readouterr().out == f"{out}\n"


@pytest.mark.parametrize("missing", ["typer", "rich", "matplotlib"])
def test_a_missing_extra_is_named(
    missing: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *more: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == missing:
            raise ImportError(f"No module named {name!r}")
        return real(name, *more, **kwargs)

    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    if missing != "matplotlib":
        monkeypatch.delitem(sys.modules, "lsg_patch.commands", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr("lsg_patch.plots.import_module", without)
    assert run("plot", tmp_path / "picture.png") == 2
    extra = "plots" if missing == "matplotlib" else "cli"
    assert f"pip install lsg-patch[{extra}]" in capsys.readouterr().err


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lsg_patch", "demo", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "--max-length" in done.stdout
