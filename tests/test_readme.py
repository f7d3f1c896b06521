"""The README says what is so."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import lsg_patch
from lsg_patch.families import table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_continuous_integration_runs_the_commands() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) == 2
    assert all(command in script for command in commands)


@pytest.mark.parametrize("code", blocks("python"))
def test_examples_run(
    code: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a real encoder that comes as a package, in place of one from a model hub."""
    from lsg_patch.demo import bundled_model

    monkeypatch.chdir(tmp_path)
    name = '"bert-base-uncased"'
    assert name in code
    exec(compile(code.replace(name, repr(str(bundled_model()))), "README.md", "exec"), {})
    assert "torch.Size([1, 3002, " in capsys.readouterr().out


def test_every_argument_is_in_the_table() -> None:
    arguments = set(inspect.signature(lsg_patch.patch_model).parameters) - {"model"}
    assert arguments <= set(re.findall(r"`(\w+)`", README))


def test_the_table_of_families_is_that_of_the_registry() -> None:
    assert table.as_markdown() in README
