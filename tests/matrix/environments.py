"""What tox.ini's environments are to test, read from it: nothing else lists the versions."""

from __future__ import annotations

import re
from configparser import ConfigParser
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent


class Pins(NamedTuple):
    """The versions that an environment is named for."""

    python: str
    torch: str
    transformers: str


def _sections() -> ConfigParser:
    tox = ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini", encoding="utf-8")
    return tox


def env_list() -> list[str]:
    """What `tox` alone runs."""
    text = _sections()["tox"]["env_list"]
    text = re.sub(
        r"([\w-]+)\{([\w,]+)\}",
        lambda m: ", ".join(m[1] + factor for factor in m[2].split(",")),
        text,
    )
    return re.findall(r"[\w-]+", text)


def pinned() -> dict[str, Pins]:
    """The environments with one release each, by name; the oldest release first."""
    tox = _sections()
    torch = _only(r"torch==([\d.]+)", tox["testenv"]["deps"])
    found = {
        f"py311-tf{factor}": Pins("3.11", torch, version)
        for factor, version in re.findall(
            r"tf(\d+): transformers==([\d.]+)", tox["testenv"]["deps"]
        )
    }
    for name in ("py311-tf4180", "old"):
        text = "\n".join(tox[f"testenv:{name}"].values())
        python = _only(r"python(3\.\d+)", text) if name == "old" else "3.11"
        found[name] = Pins(
            python, _only(r"torch==([\d.]+)", text), _only(r"transformers==([\d.]+)", text)
        )
    return dict(sorted(found.items(), key=lambda item: (numbers(item[1].transformers), item)))


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _only(pattern: str, text: str) -> str:
    [found] = re.findall(pattern, text)
    return str(found)
