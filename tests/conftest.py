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
    """Keep what was imported and collected out of the collector's walks: a patch does one as well."""
    gc.collect()
    gc.freeze()
