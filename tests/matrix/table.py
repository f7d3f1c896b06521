"""The README's table of versions, from what the matrix's environments wrote down.

`tox -e table` takes the results of the environments that were run, keeps them in results.json and
writes the table.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from tests.matrix.environments import ROOT, pinned

RESULTS = Path(__file__).parent / "results.json"
README = ROOT / "README.md"
MARKED = re.compile(r"(?<=<!-- tests/matrix -->\n).*?(?=<!-- -->)", re.DOTALL)

# environment -> its versions, and "pass", "absent" or "fail" for each family
Results = dict[str, Any]


def stored() -> Results:
    return dict(json.loads(RESULTS.read_text(encoding="utf-8"))) if RESULTS.exists() else {}


def gathered(folder: Path) -> Results:
    """What is stored, with what was run since; in the order of tox.ini's versions."""
    results = stored()
    for file in folder.glob("*.json"):
        results[file.stem] = json.loads(file.read_text(encoding="utf-8"))
    return {name: results[name] for name in pinned() if name in results}


def as_markdown(results: Results) -> str:
    """A row for each environment, a column for all families that fare alike."""
    columns: dict[tuple[str, ...], list[str]] = defaultdict(list)
    families = {family for result in results.values() for family in result["families"]}
    for family in sorted(families):
        cells = tuple(result["families"].get(family, "not run") for result in results.values())
        columns[cells].append(family)
    versions = [
        [result["transformers"], result["torch"], result["python"]] for result in results.values()
    ]
    shared = sorted(columns.items(), key=lambda column: -len(column[1]))
    lines = [
        ["transformers", "torch", "Python", *(", ".join(families) for _, families in shared)],
        ["---"] * (3 + len(shared)),
        *([*row, *(cells[index] for cells, _ in shared)] for index, row in enumerate(versions)),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(folder: str) -> None:
    results = gathered(Path(folder))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = README.read_text(encoding="utf-8")
    README.write_text(MARKED.sub(lambda _: as_markdown(results), text), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
