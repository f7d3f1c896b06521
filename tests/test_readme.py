"""The README says what is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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


def test_it_is_read_in_five_minutes() -> None:
    assert len(README.splitlines()) < 150


def test_its_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", README):
        assert link.startswith("https://") or (ROOT / link.partition("#")[0]).exists(), link
