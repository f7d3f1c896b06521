"""One list of versions: what tox.ini, the workflow, the package and the README say agrees."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lsg_patch import requirements
from lsg_patch.families import FAMILIES
from tests.matrix import record, table
from tests.matrix.environments import ROOT, Pins, env_list, numbers, pinned
from tests.matrix.specimens import SPECIMENS

WORKFLOW = (ROOT / ".github" / "workflows" / "matrix.yml").read_text(encoding="utf-8")


def test_environments_are_named_for_their_versions() -> None:
    for name, pins in pinned().items():
        if name != "old":
            assert name == f"py{pins.python}-tf{pins.transformers}".replace(".", "")


def test_tox_alone_runs_all_but_the_old_torch() -> None:
    assert {*pinned(), "quick", "latest"} - set(env_list()) == {"old"}


def test_the_workflow_has_a_job_for_each() -> None:
    [listed] = re.findall(r"env: \[(.*?)\]", WORKFLOW, re.DOTALL)
    assert re.findall(r"[\w-]+", listed) == env_list()
    for weekly in ("old", "latest"):
        assert f"tox -e {weekly}" in WORKFLOW


def test_actions_are_pinned_by_hash() -> None:
    files = sorted((ROOT / ".github" / "workflows").iterdir())
    used = [x for f in files for x in re.findall(r"uses: *(\S+)", f.read_text(encoding="utf-8"))]
    assert used and all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action) for action in used), used


def test_the_tested_range_is_that_of_the_package() -> None:
    releases = [numbers(pins.transformers)[:2] for pins in pinned().values()]
    assert (min(releases), max(releases)) == (
        requirements.FLOORS["transformers"],
        requirements.NEWEST,
    )
    oldest = pinned()["old"]
    assert numbers(oldest.torch)[:2] == requirements.FLOORS["torch"]
    assert numbers(oldest.python) == requirements.PYTHON


def test_floors_are_those_of_pyproject() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'requires-python = ">={}.{}"'.format(*requirements.PYTHON) in project
    for name, floor in requirements.FLOORS.items():
        assert '"{}>={}.{}"'.format(name, *floor) in project


def run_recorded(folder: Path, test: str, name: str) -> subprocess.CompletedProcess[str]:
    """Run pytest with the plugin, as an environment of this name runs it."""
    (folder / "tests" / "matrix").mkdir(parents=True)
    (folder / "tests" / "matrix" / "test_matrix.py").write_text(test, encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "--import-mode=importlib", "-p", "tests.matrix.record"],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
            record.ENVIRONMENT: name,
            record.WORK: str(folder),
        },
        capture_output=True,
        text=True,
    )


def test_an_environment_with_other_versions_than_its_name_says_does_not_start(
    tmp_path: Path,
) -> None:
    found = record.installed()
    other = next(name for name, pins in pinned().items() if pins != found)
    done = run_recorded(tmp_path, "def test_nothing(): pass", other)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"{other} is to test {pinned()[other]}, but has {found}" in done.stderr


def test_results_are_written_down_and_skips_are_counted(tmp_path: Path) -> None:
    test = """
import pytest

def test_of_no_family(): pass

@pytest.mark.parametrize("family", ["good", "some", "gone", "bad-one"])
def test_first(family):
    if family == "gone":
        pytest.skip("absent: this transformers has no gone")

@pytest.mark.parametrize("family", ["good", "some", "gone", "bad-one"])
def test_second(family):
    if family in ("gone", "some"):
        pytest.skip("absent: this transformers has no gone" if family == "gone" else "no need")
    assert family != "bad-one"
"""
    done = run_recorded(tmp_path, test, "latest")
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "2 families pass, 1 absent (gone); 3 tests skipped" in done.stdout
    written = json.loads((tmp_path / "matrix" / "latest.json").read_text(encoding="utf-8"))
    families = written.pop("families")
    assert families == {"bad-one": "fail", "gone": "absent", "good": "pass", "some": "pass"}
    assert Pins(**written) == record.installed()


def test_results_are_there_for_every_environment_and_family() -> None:
    """If this fails, run `tox` and `tox -e table`; the old torch may be left out."""
    results = table.stored()
    assert [name for name in pinned() if name not in results] in ([], ["old"])
    for name, result in results.items():
        pins = pinned()[name]
        assert Pins(result["python"], result["torch"], result["transformers"]) == pins
        assert set(result["families"]) == {specimen.family for specimen in SPECIMENS}
        assert set(result["families"].values()) <= {"pass", "absent"}


def test_every_registered_family_is_tested() -> None:
    assert {specimen.family for specimen in SPECIMENS} == set(FAMILIES)


def test_the_readme_has_the_table_of_the_results() -> None:
    assert table.MARKED.findall(table.README.read_text(encoding="utf-8")) == [
        table.as_markdown(table.stored())
    ]
