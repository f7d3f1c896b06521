"""Count the tensor memory a piece of code needs, on any device, without asking the device.

What an allocator reports depends on what ran before. Here every operation is watched instead, so
that two runs of the same code give the same number and a single quadratic tensor cannot hide.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


@dataclass
class PeakMemory:
    """What was allocated inside a `peak_memory()` block; updated while the block runs.

    `peak_bytes` is the most bytes of tensor storage that were alive at once; `largest_numel` and
    `largest_shape` are those of the largest single tensor.
    """

    peak_bytes: int = 0
    largest_numel: int = 0
    largest_shape: tuple[int, ...] = ()


class _AllocationCounter(TorchDispatchMode):
    """Watches every operation and keeps the storages that were first seen as somebody's output."""

    def __init__(self, result: PeakMemory) -> None:
        super().__init__()
        self.result = result
        # The bytes of each. A weak reference keeps the address from being used again, not the data
        # from being freed.
        self._alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Under inference_mode composite operations arrive whole (a `matmul`, an attention): what
        # they allocate inside is seen only if they are taken apart here.
        with self:
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out

        out = func(*args, **kwargs)
        # A storage that came in is not new: views, in-place and out= operations. `lift_fresh` is
        # the exception: it is how `torch.tensor(...)` hands over the tensor it has just made.
        fresh = func is torch.ops.aten.lift_fresh.default
        given = set() if fresh else {StorageWeakRef(s) for _, s in _storages((args, kwargs))}
        self._alive = {s: size for s, size in self._alive.items() if not s.expired()}
        for tensor, storage in _storages(out):
            reference, size = StorageWeakRef(storage), storage.nbytes()
            known = self._alive.get(reference)
            # Made before the block, or not by torch; or known, and not resized by an out= operation.
            if known == size or (known is None and reference in given):
                continue
            self._alive[reference] = size
            if tensor.numel() > self.result.largest_numel:
                self.result.largest_numel = tensor.numel()
                self.result.largest_shape = tuple(tensor.shape)
        self.result.peak_bytes = max(self.result.peak_bytes, sum(self._alive.values()))
        return out


def _storages(tree: Any) -> Iterator[tuple[Tensor, torch.UntypedStorage]]:
    """The tensors in `tree` that have a storage (sparse and wrapper tensors may have none)."""
    for leaf in tree_flatten(tree)[0]:
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
            try:
                yield leaf, leaf.untyped_storage()
            except (NotImplementedError, RuntimeError):  # reason: a wrapper has no storage to count
                continue


@contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Measure the tensor memory (in bytes) of the operations in the `with` body.

    Counted are storages that operations of this thread return: each once, whatever views of it
    there are, from its making until nothing refers to it. Not counted are tensors made before
    the block (weights, inputs) and the scratch buffers inside one kernel; compiled functions are
    one kernel in this sense, so measure eager code. Watching costs time: do not time a block
    that is measured.
    """
    result = PeakMemory()
    with _AllocationCounter(result):
        yield result
