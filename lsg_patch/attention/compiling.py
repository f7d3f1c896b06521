"""Whether what runs is being recorded, in which case it would be recorded for these sizes alone."""

from __future__ import annotations

import torch


def is_exporting() -> bool:
    """Whether torch.export, torch.jit.trace or an ONNX exporter is: what it records is for all sizes."""
    exporting = getattr(torch.compiler, "is_exporting", None)  # torch 2.7 and later
    return bool(torch._C._get_tracing_state() or (exporting and exporting()))


def is_traced_to_onnx() -> bool:
    """Whether it is the ONNX exporter by a trace (dynamo=False), which fixes sizes after the trace."""
    return bool(torch._C._get_tracing_state() and torch.onnx.is_in_onnx_export())


def keeps_operations() -> bool:
    """Whether it is torch.compile alone, which runs an operation of ours as it is.

    Exported programs are run by others, and torch before 2.7 does not tell them from compiled ones.
    """
    if not hasattr(torch.compiler, "is_exporting") or torch._C._are_functorch_transforms_active():
        return False
    return torch.compiler.is_compiling() and not is_exporting()


def _is_followed() -> bool:
    """Whether torch.compile or torch.export is following this call."""
    compiler = getattr(torch.compiler, "is_compiling", None)  # torch 2.3 and later
    return bool(compiler() if compiler else torch._dynamo.is_compiling())


def is_transformed() -> bool:
    """Whether a transform of torch.func alone is following this call."""
    return not _is_followed() and torch._C._are_functorch_transforms_active()


def is_compiling() -> bool:
    """Whether torch.compile, torch.export, torch.jit.trace, a CUDA graph, a transform of torch.func or a
    mode of tensors without values (FakeTensorMode) is following this call: then no value can be looked at,
    and memory is not to be written to.
    """
    if _is_followed():
        return True
    # torch's own autograd functions ask for transforms in this way
    if is_exporting() or torch._C._are_functorch_transforms_active():
        return True
    keys = getattr(torch._C, "_TorchDispatchModeKey", None)  # torch 2.2 and later
    if keys and torch._C._get_dispatch_mode(keys.FAKE) is not None:
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def at_least_two(size: int) -> int:
    """``size``, but 2 for 1, as what an exporter records for all sizes."""
    # a trace follows arithmetic alone
    return size + 1 // size if torch._C._get_tracing_state() else torch.sym_max(size, 2)
