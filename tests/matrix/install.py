"""pip for tox: a pinned torch is installed once, into a folder that all environments share.

Takes the arguments of `pip install`. Torch is a gigabyte or more, and a matrix has many
environments. One that asks for `torch==X` gets a `.pth` file that leads to the folder of this X;
to pip the requirement is then met.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path


def pip_install(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "install", *arguments], check=True)


def share(pin: str) -> None:
    """Lead this environment to the folder beside it that has ``pin``; make it if it is not there."""
    python = f"py{sys.version_info[0]}{sys.version_info[1]}"
    folder = Path(sys.prefix).parent / "shared" / f"{python}-{pin}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.mkdtemp(dir=folder.parent)
        pip_install("-q", "--target", made, pin)
        try:
            os.rename(made, folder)  # all of it or nothing
        except OSError:  # another environment was quicker
            shutil.rmtree(made)
    Path(sysconfig.get_path("purelib"), "shared.pth").write_text(f"{folder}\n", encoding="utf-8")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        if argument.startswith("torch=="):
            share(argument)
    try:
        # of thousands of modules a test imports some, and python compiles those then
        pip_install("--no-compile", *sys.argv[1:])
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
