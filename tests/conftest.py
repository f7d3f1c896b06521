"""What holds for all tests."""

import gc

import torch
from hypothesis import settings

# tensors are tiny here: more threads only wait for each other
torch.set_num_threads(1)
# a busy machine makes no property false
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_collection_finish() -> None:
    """What was imported and collected stays: a patch, which asks the collector who holds a model, and
    the collector itself need not go through it again and again."""
    gc.collect()
    gc.freeze()
