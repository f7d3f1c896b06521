"""The pages of the documentation say what is so: each is run as one session, from its first block on."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import shlex
from pathlib import Path

import pytest

import lsg_patch
from lsg_patch import cli
from lsg_patch.families import table

DOCS = Path(__file__).parent.parent / "docs"
NOTEBOOK = DOCS.parent / "examples" / "long_documents.ipynb"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
NEEDS = re.compile(r"<!-- needs: ([\w ]+) -->")
FAMILIES = re.compile(r"<!-- families -->\n(.*?)<!-- /families -->", re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_the_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a real encoder that comes as a package, in place of one from a model hub."""
    from lsg_patch.demo import bundled_model

    text = page.read_text(encoding="utf-8")
    for package in " ".join(NEEDS.findall(text)).split():
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}, which `tox -e ecosystem` has")
    monkeypatch.chdir(tmp_path)
    session: dict[str, object] = {}
    for language, code in BLOCK.findall(text):
        if language == "python":
            own = code.replace('"bert-base-uncased"', repr(str(bundled_model())))
            exec(compile(own, page.name, "exec"), session)
        elif language == "sh":
            for line in code.splitlines():
                command, *arguments = shlex.split(line)
                if command == "lsg-patch":
                    assert cli.main(arguments) == 0
                else:
                    assert line == "pip install lsg-patch"
        else:
            assert language in ("text", "markdown")


def test_the_notebook_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="tox -e py311-tf5230 has it").use("Agg")
    from lsg_patch.demo import bundled_model

    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    session: dict[str, object] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            code = "".join(cell["source"])
            own = code.replace('"bert-base-uncased"', repr(str(bundled_model())))
            exec(compile(own, NOTEBOOK.name, "exec"), session)
    told = capsys.readouterr().out
    assert "bit for bit: True" in told and "reverted: True" in told


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_what_is_named_is_there(page: Path) -> None:
    """Links to pages and pictures, and files that a text names; anchors are for `tox -e docs`."""
    text = page.read_text(encoding="utf-8")
    for link in LINK.findall(text):
        path = link.partition("#")[0]
        if path and not link.startswith("https://"):
            assert (DOCS / path).is_file(), link
    for name in re.findall(r"`((?:examples|tests|benchmarks)/[\w/.]+)`", text):
        assert (DOCS.parent / name).exists(), name


def test_the_table_of_families_is_that_of_the_registry() -> None:
    [listed] = FAMILIES.findall((DOCS / "families.md").read_text(encoding="utf-8"))
    assert listed.strip() == table.as_markdown()


def test_every_argument_is_in_the_table() -> None:
    arguments = set(inspect.signature(lsg_patch.patch_model).parameters) - {"model"}
    page = (DOCS / "choosing.md").read_text(encoding="utf-8")
    assert arguments <= set(re.findall(r"`(\w+)`", page))


def test_every_public_name_is_in_the_api() -> None:
    listed = re.findall(
        r"^::: lsg_patch\.(\w+)$", (DOCS / "api.md").read_text("utf-8"), re.MULTILINE
    )
    assert sorted(listed) == sorted(lsg_patch.__all__)
