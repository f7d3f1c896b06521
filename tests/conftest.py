"""What holds for all tests."""

import torch
from hypothesis import settings

# tensors are tiny here: more threads only wait for each other
torch.set_num_threads(1)
# a busy machine makes no property false
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
