"""What holds for all tests."""

import torch

# tensors are tiny here: more threads only wait for each other
torch.set_num_threads(1)
