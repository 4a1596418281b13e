"""One thread, here and in every program that a test starts: two cores are shared, and waiting threads burn them."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
