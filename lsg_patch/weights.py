"""The files of a checkpoint: found where transformers finds them, read without running anything."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from lsg_patch import compat

SAFE = ".safetensors"
# what says where on the hub a file is to be found
HUB_NAMES = (
    "cache_dir",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "use_auth_token",
)
# keywords of a load that say which files of it are read
OF_SOURCE = (*HUB_NAMES, "variant", "use_safetensors")


@dataclass(frozen=True)
class Source:
    """A checkpoint: a folder or a repository of the hub, and what ``from_pretrained`` is told of it."""

    path: str
    hub: Mapping[str, Any]
    variant: str | None
    use_safetensors: bool | None

    @classmethod
    def of(cls, path: str | os.PathLike[str], given: Mapping[str, Any]) -> Source:
        """With the keywords ``given`` to a ``from_pretrained``, of which others are left out."""
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"name a folder or a repository of the hub, not {path!r}")
        hub = {name: given[name] for name in HUB_NAMES if given.get(name) is not None}
        return cls(os.fspath(path), hub, given.get("variant"), given.get("use_safetensors"))

    def find(self, name: str) -> str | None:
        """Where the file ``name`` lies; None: there is none. A folder is not looked for elsewhere."""
        if not os.path.isdir(self.path):
            return compat.hub_file(self.path, name, **self.hub)
        file = os.path.join(self.path, self.hub.get("subfolder", ""), name)
        return file if os.path.isfile(file) else None

    def config(self) -> dict[str, Any]:
        """What ``config.json`` says.

        Raises:
            OSError: there is none.
            ValueError: it is no JSON object.
        """
        file = self.find("config.json")
        if file is None:
            raise OSError(
                f"{self.path!r} has no config.json, or it is not to be had: name the folder or the "
                "repository of a model"
            )
        return _json(file)

    def weights(self) -> list[str]:
        """The files that hold the weights, those that ``from_pretrained`` takes.

        Raises:
            ValueError: the index of the files is wrong or names one that is not there.
        """
        kinds = [("model", "safetensors")] if self.use_safetensors is not False else []
        kinds += [("pytorch_model", "bin")] if not self.use_safetensors else []
        if not compat.reads_safetensors():
            kinds.reverse()
        variant = f".{self.variant}" if self.variant else ""
        for stem, end in kinds:
            file = self.find(f"{stem}{variant}.{end}")
            if file is not None:
                return [file]
            index = self.find(f"{stem}.{end}.index{variant}.json")
            if index is not None:
                return self._shards(index)
        return []

    def _shards(self, index: str) -> list[str]:
        """The files that ``index`` names: files beside it, nothing above or elsewhere."""
        names = _json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ValueError(
                f"{index} has weight_map={names!r}, not the file of each weight: save it again"
            )
        for name in names.values():
            if not isinstance(name, str) or PurePath(name).name != name or "\\" in name:
                raise ValueError(
                    f"{index} names the file {name!r}, which is not one beside it: take it out"
                )
        found = []
        for name in dict.fromkeys(names.values()):
            file = self.find(name)
            if file is None:
                raise ValueError(
                    f"{index} names {name!r}, which is not there: save or fetch it again"
                )
            found.append(file)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """All weights by name, on the CPU; what is mapped is in memory only when it is used.

        Raises:
            ValueError: a file is damaged, or has more in it than tensors.
        """
        return {name: x for file in self.weights() for name, x in _tensors(file).items()}

    @contextmanager
    def for_this_release(self) -> Iterator[str]:
        """The path for ``from_pretrained``, or that of a copy in pickles, if it reads no others (4.21)."""
        if compat.reads_safetensors() or not any(x.endswith(SAFE) for x in self.weights()):
            yield self.path
            return
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(self.config()), "utf-8")
            weights = {name: x.clone() for name, x in self.tensors().items()}
            torch.save(weights, Path(folder, "pytorch_model.bin"))
            yield folder


def _json(file: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(file).read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}. Save or fetch it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}, not an object: save it again")
    return found


def _tensors(file: str) -> dict[str, Tensor]:
    try:
        if file.endswith(SAFE):
            from safetensors.torch import load_file

            return load_file(file)
        # what torch wrote before 1.6 is no zip file and cannot be mapped
        found = torch.load(file, "cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None)
        for name, value in found.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise ValueError(f"{name!r} is a {type(value).__name__}, not a tensor")
    except Exception as error:
        raise ValueError(
            f"{file} cannot be read as weights: {error}. Save or fetch it again"
        ) from error
    return found  # type: ignore[no-any-return]
