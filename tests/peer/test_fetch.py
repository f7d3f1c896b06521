"""Where the peer's tests cannot be had, the reason is given, and nothing is left behind."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.peer import fetch
from tests.peer.test_common_suite import cases_or_skip


def archive(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as made:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            made.addfile(member, io.BytesIO(text.encode()))
    return path


def config(cache: Path) -> Any:
    return SimpleNamespace(cache=SimpleNamespace(mkdir=lambda name: cache))


def test_without_a_network_the_tests_are_skipped_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="cannot be downloaded: .*transformers"):
        cases_or_skip(config(tmp_path / "cache"))
    assert not any((tmp_path / "cache").iterdir())


def test_without_a_network_continuous_integration_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    monkeypatch.setenv("CI", "true")
    with pytest.raises(fetch.NoSuiteError, match="cannot be downloaded"):
        cases_or_skip(config(tmp_path / "cache"))


def test_a_release_of_another_layout_is_refused(tmp_path: Path) -> None:
    other = archive(tmp_path / "transformers-9.tar.gz", {"transformers-9/tests/test_other.py": ""})
    with pytest.raises(fetch.NoSuiteError, match=r"9\.tar\.gz has no tests/test_modeling_common"):
        fetch.unpack(other, tmp_path / "package")


def test_only_the_tests_themselves_are_unpacked(tmp_path: Path) -> None:
    files = {
        "transformers-9/tests/test_modeling_common.py": "x = 1",
        "transformers-9/src/tests/test_modeling_common.py": "x = 2",
        "transformers-9/setup.py": "x = 3",
    }
    fetch.unpack(archive(tmp_path / "transformers-9.tar.gz", files), tmp_path / "package")
    found = {path.name: path.read_text() for path in (tmp_path / "package").iterdir()}
    assert found == {"__init__.py": "", "test_modeling_common.py": "x = 1"}
