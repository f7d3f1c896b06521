"""`accelerate launch` with two processes trains a patched model as one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.ecosystem.launched import train
from tests.matrix.environments import ROOT

# --multi_gpu is what starts several processes by itself; the script says that it wants a CPU
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--main_process_port", "0"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]
TYPES = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPBertForSequenceClassification"}


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Losses and weights, with gradients gathered over two batches; no parameter is left out."""
    done = subprocess.run(
        [sys.executable, *LAUNCH, "-m", "tests.ecosystem.launched", str(tmp_path), *TYPES],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    alone = train("alone")
    assert len(alone["losses"]) == 4 and alone["losses"][2:] != alone["losses"][:2]
    assert "bert.embeddings.global_embeddings.weight" in alone["weights"]
    for way, type_name in TYPES.items():
        found = torch.load(tmp_path / way, weights_only=True)
        assert found["type"] == type_name
        torch.testing.assert_close(found["losses"], alone["losses"], rtol=0, atol=1e-4)
        torch.testing.assert_close(found["weights"], alone["weights"], rtol=0, atol=1e-5)
