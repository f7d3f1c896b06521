"""The files of a checkpoint: found where transformers finds them, read without running anything."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from lsg_patch import compat
from lsg_patch.inspection import Stored

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
# before the names of a base model's weights; published checkpoints have that of transformers
OF_REFERENCE = "lsg."


@dataclass(frozen=True)
class Source:
    """A checkpoint: a folder or a repository of the hub, and what ``from_pretrained`` is told of it."""

    path: str
    hub: Mapping[str, Any] = field(default_factory=dict)
    variant: str | None = None
    use_safetensors: bool | None = None

    @classmethod
    def of(cls, path: str | os.PathLike[str], given: Mapping[str, Any]) -> Source:
        """With the keywords ``given`` to a ``from_pretrained``, of which others are left out."""
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

    def weights(self) -> dict[str, list[str] | None]:
        """The files that hold the weights, those that ``from_pretrained`` takes, and whose; None: all.

        Raises:
            ValueError: the index of the files is wrong or names one that is not there.
        """
        kinds = ["model.safetensors"] if self.use_safetensors is not False else []
        kinds += ["pytorch_model.bin"] if not self.use_safetensors else []
        if not compat.reads_safetensors():
            kinds.reverse()
        for kind in kinds:
            stem, end = kind.rsplit(".", 1)
            name = f"{stem}.{self.variant}.{end}" if self.variant else kind
            index = (
                f"{stem}.{end}.index.{self.variant}.json" if self.variant else f"{kind}.index.json"
            )
            file = self.find(name)
            if file is not None:
                return {file: None}
            file = self.find(index)
            if file is not None:
                return {self._shard(file, shard): names for shard, names in _shards(file).items()}
        return {}

    def read(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """The tensors whose names are ``wanted``, on the CPU, by name; no other ones are read.

        Raises:
            ValueError: a file is damaged, or has more in it than tensors.
        """
        found: dict[str, Tensor] = {}
        for file, names in self.weights().items():
            # of pickles every one is looked at, before others load it
            safe = file.endswith(SAFE)
            if safe and names is not None and not any(map(wanted, names)):
                continue
            with _readable(file):
                found.update(_read(file, wanted))
        return found

    def stored(self) -> dict[str, Stored]:
        """All weights as the files describe them, by name.

        Raises:
            ValueError: as ``read``.
        """
        found: dict[str, Stored] = {}
        for file in self.weights():
            with _readable(file):
                found.update(_described(file))
        return found

    @contextmanager
    def for_this_release(self, stored: Mapping[str, Stored], prefix: str) -> Iterator[str]:
        """The path for ``from_pretrained``; a copy, where it could not read these files (before 4.22).

        Nor by their names: ``prefix`` is to stand where they begin with ``OF_REFERENCE``.
        """
        safe = any(weight.file.endswith(SAFE) for weight in stored.values())
        renamed = any(name.startswith(OF_REFERENCE) for name in stored)
        if not renamed and (compat.reads_safetensors() or not safe):
            yield self.path
            return
        weights = {
            f"{prefix}.{name.removeprefix(OF_REFERENCE)}"
            if name.startswith(OF_REFERENCE)
            else name: x
            for name, x in self.read(lambda name: True).items()
        }
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(self.config()), "utf-8")
            torch.save(weights, Path(folder, "pytorch_model.bin"))
            yield folder

    def _shard(self, index: str, name: str) -> str:
        file = self.find(name)
        if file is None:
            raise ValueError(f"{index} names {name!r}, which is not there: save or fetch it again")
        return file


def _json(file: str) -> dict[str, Any]:
    try:
        with open(file, encoding="utf-8") as text:
            found = json.load(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}. Save or fetch it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}, not an object: save it again")
    return found


def _shards(index: str) -> dict[str, list[str]]:
    """The names of the weights in each file that an index names."""
    files = _json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(
            f"{index} has weight_map={files!r}, not the file of each weight: save it again"
        )
    found: dict[str, list[str]] = {}
    for name, file in files.items():
        # a file beside the index, nothing above or elsewhere
        if not isinstance(file, str) or PurePath(file).name != file or "\\" in file:
            raise ValueError(
                f"{index} names the file {file!r}, which is not one beside it: take it out"
            )
        found.setdefault(file, []).append(name)
    return found


def _read(file: str, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    if file.endswith(SAFE):
        from safetensors import safe_open

        with safe_open(file, "pt") as tensors:
            names: list[str] = tensors.keys()
            return {name: tensors.get_tensor(name) for name in names if wanted(name)}
    return {name: value.clone() for name, value in _unpickled(file).items() if wanted(name)}


def _described(file: str) -> dict[str, Stored]:
    if not file.endswith(".safetensors"):
        return {
            name: Stored(file, tuple(value.shape), str(value.dtype).removeprefix("torch."))
            for name, value in _unpickled(file).items()
        }
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
        return {
            name: Stored(
                file, tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), part.get_dtype())
            )
            for name, part in slices.items()
        }


# names of safetensors, and torch's
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "I64": "int64"}


def _unpickled(file: str) -> dict[str, Tensor]:
    """The tensors in a file of torch; of one as it writes it since 1.6 nothing is in memory yet."""
    loaded = torch.load(file, "cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None)
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{name!r} is a {type(value).__name__}, not a tensor")
    return loaded  # type: ignore[no-any-return]


@contextmanager
def _readable(file: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{file} cannot be read as weights: {error}. Save or fetch it again"
        ) from error
