"""The entry of the command line: what is missing or wrong is one line and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence

DISTRIBUTION = "lsg-patch"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code is 0, or 1 for a failed check, or 2 for a wrong request.

    ``--debug`` anywhere among the arguments raises what went wrong.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in given
    try:
        from lsg_patch.commands import app
    except ImportError as error:
        print(f"{DISTRIBUTION}: {error}: pip install {DISTRIBUTION}[cli]", file=sys.stderr)
        return 2
    try:
        app([x for x in given if x != "--debug"], DISTRIBUTION)
    except SystemExit as end:
        return int(end.code or 0)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        if debug:
            raise
        print(f"{DISTRIBUTION}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
