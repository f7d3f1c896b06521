"""`accelerate launch` with two processes trains a patched model as one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ecosystem.launched import train
from tests.matrix.environments import ROOT

# --multi_gpu is what starts several processes by itself; the script says that it wants a CPU
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1"]
LAUNCH += ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launched")
    done = subprocess.run(
        [sys.executable, *LAUNCH, "-m", "tests.ecosystem.launched", str(folder), "ddp", "fsdp2"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    ("way", "type_name"),
    [("ddp", "DistributedDataParallel"), ("fsdp2", "FSDPBertForSequenceClassification")],
)
def test_two_processes_train_as_one(way: str, type_name: str, launched: Path) -> None:
    """Losses and weights, with gradients gathered over two batches; no parameter is left out."""
    found, alone = torch.load(launched / way, weights_only=True), train("alone")
    assert (found["type"], alone["type"]) == (type_name, "BertForSequenceClassification")
    assert len(alone["losses"]) == 4 and alone["losses"][2:] != alone["losses"][:2]
    torch.testing.assert_close(found["losses"], alone["losses"], rtol=0, atol=1e-4)
    assert "bert.embeddings.global_embeddings.weight" in found["weights"]
    torch.testing.assert_close(found["weights"], alone["weights"], rtol=0, atol=1e-5)
