"""ONNX: what torch.onnx exports gives the model's outputs in onnxruntime, at sizes it has not seen."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor

from tests.ecosystem.test_exporting import check, encoder, example_of


@pytest.mark.parametrize("selection", ["norm", "lsh", "bos_pooling"])
def test_onnxruntime_gives_the_same(selection: str, tmp_path: Path) -> None:
    model, path = encoder(sparsity_type=selection), str(tmp_path / "model.onnx")
    size = {0: torch.export.Dim("B", max=64), 1: torch.export.Dim("T", max=100)}
    torch.onnx.export(
        model,
        example_of(31, True),
        path,
        dynamo=True,
        input_names=["ids", "mask"],
        dynamic_shapes=[size, size],
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path)

    def run(ids: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        return torch.from_numpy(session.run(None, {"ids": ids.numpy(), "mask": mask.numpy()})[0])

    check(run, model, masked=True)


def test_the_exporter_by_a_trace_is_told_of(tmp_path: Path) -> None:
    """It takes the example's sizes for those of all inputs, and onnxruntime then refuses others."""
    model, path = encoder(), str(tmp_path / "model.onnx")
    ids, mask = example_of(31, True)
    with pytest.warns(UserWarning, match="pass dynamo=True"):
        torch.onnx.export(
            model, (ids, mask), path, dynamo=False, input_names=["ids", "mask"], opset_version=17
        )
    session = onnxruntime.InferenceSession(path)
    [found] = session.run(None, {"ids": ids.numpy(), "mask": mask.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(ids, mask), rtol=0, atol=1e-4)
