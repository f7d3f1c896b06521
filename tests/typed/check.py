"""`mypy --strict` of `user.py` against the lsg_patch that is installed: the source tree is out of sight."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

USER = Path(__file__).with_name("user.py")

if __name__ == "__main__":
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # mypy looks beside a file and in its own folder first
        shutil.copy(USER, folder)
        mypy = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={folder}"]
        sys.exit(subprocess.run([*mypy, USER.name], cwd=folder).returncode)
