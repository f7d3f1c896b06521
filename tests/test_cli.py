"""The command line itself; what its commands do is tested with them."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

from lsg_patch import cli


def test_version(capsys, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: f"1.2.3 of {name}")
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out.strip() == "lsg-patch 1.2.3 of lsg-patch"


def test_version_of_a_source_tree(capsys, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0
    assert "not installed" in capsys.readouterr().out


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert command.name in out and command.summary in out


@pytest.mark.parametrize("argv", [[], ["no-such-command"], ["demo", "--documents", "-1"]])
def test_wrong_arguments_are_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(argv)
    assert exit.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_a_command_gets_its_arguments_and_gives_the_exit_code(monkeypatch):
    got = []

    def run(args):
        got.append(args.times)
        return 7

    command = cli.Command("say", "says it", lambda p: p.add_argument("times", type=int), run)
    monkeypatch.setattr(cli, "COMMANDS", (command,))
    assert cli.main(["say", "3"]) == 7
    assert got == [3]


def test_defaults_of_the_demo_are_those_of_its_options(monkeypatch):
    from lsg_patch import demo

    got = []
    monkeypatch.setattr(demo, "run", lambda options: got.append(options) or 0)
    assert cli.main(["demo"]) == 0
    assert got == [demo.DemoOptions()]


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "lsg_patch", "demo", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "--max-length" in done.stdout
