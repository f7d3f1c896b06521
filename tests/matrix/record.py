"""A plugin of pytest: sees that an environment has what its name says, and writes down its results.

`python -m pytest -p tests.matrix.record` inside an environment of tox.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections import defaultdict
from importlib import metadata
from pathlib import Path

import pytest

from tests.matrix.environments import Pins, pinned

ENVIRONMENT = "TOX_ENV_NAME"  # tox sets it, and the next
WORK = "TOX_WORK_DIR"
TEST = re.compile(r"tests/matrix/test_matrix\.py::\w+\[([\w-]+)\]")


def installed() -> Pins:
    return Pins(
        python=".".join(platform.python_version_tuple()[:2]),
        torch=metadata.version("torch").split("+")[0],
        transformers=metadata.version("transformers"),
    )


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # the process that gives out the tests reports them
        return
    name, found = os.environ.get(ENVIRONMENT, ""), installed()
    wanted = pinned().get(name, found)
    if found != wanted:
        raise pytest.UsageError(f"{name} is to test {wanted}, but has {found}: `tox -r -e {name}`")
    config.pluginmanager.register(Record(name, found))


class Record:
    """Counts what becomes of the matrix's tests, family by family."""

    def __init__(self, environment: str, pins: Pins) -> None:
        self.environment, self.pins = environment, pins
        self.counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        of_family = TEST.match(report.nodeid)
        # a test has three reports; one that passes, its call
        if of_family and (report.when == "call" or not report.passed):
            absent = report.skipped and "absent: " in str(report.longrepr)
            self.counts[of_family[1]]["absent" if absent else report.outcome] += 1

    def results(self) -> dict[str, str]:
        """Of each family: "pass", "absent" or "fail"."""
        return {
            family: "fail" if counts["failed"] else "absent" if counts["absent"] else "pass"
            for family, counts in sorted(self.counts.items())
        }

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.counts:
            return
        results = self.results()
        skips = sum(counts["skipped"] + counts["absent"] for counts in self.counts.values())
        absent = [family for family, result in results.items() if result == "absent"]
        terminalreporter.write_line(
            f"matrix: Python {self.pins.python}, torch {self.pins.torch}, transformers "
            f"{self.pins.transformers}: {list(results.values()).count('pass')} families pass, "
            f"{len(absent)} absent{' (' if absent else ''}{', '.join(absent)}"
            f"{')' if absent else ''}; {skips} tests skipped"
        )

    def pytest_sessionfinish(self) -> None:
        if self.counts and WORK in os.environ:
            folder = Path(os.environ[WORK], "matrix")
            folder.mkdir(exist_ok=True)
            (folder / f"{self.environment}.json").write_text(
                json.dumps({**self.pins._asdict(), "families": self.results()}, indent=1) + "\n",
                encoding="utf-8",
            )
