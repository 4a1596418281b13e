"""One thread: two cores are shared, and the suite should say the same wherever it runs."""

import torch

torch.set_num_threads(1)
