"""The 1,797 handwritten digits of 8 x 8 pixels that scikit-learn carries.

Source: Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (Alpaydin and Kaynak, 1998).
"""

import numpy as np
import torch
from sklearn.datasets import load_digits

from workloads.workload import Data, hashed

SPLIT_SEED = 2026
VALID_PER_DIGIT = 36


def digits(*, shape: tuple[int, ...]) -> Data:
    """1,437 examples to train on, 360 to validate on: (images, labels), pixels in [0, 1], labels 0 to 9.

    `shape` is the shape of one image, such as (64,) or (1, 8, 8). The validation set holds 36 of each digit, drawn
    with a seed of its own, so chance level is 10 % and one image more or less is 0.28 % of accuracy.
    """
    bunch = load_digits()
    labels = bunch.target.astype(np.int64)
    rng = np.random.default_rng(SPLIT_SEED)
    held_out = [rng.permutation(np.flatnonzero(labels == digit))[:VALID_PER_DIGIT] for digit in range(10)]
    is_valid = np.isin(np.arange(len(labels)), np.concatenate(held_out))
    images = torch.tensor(bunch.data / 16, dtype=torch.float32).reshape(-1, *shape)
    classes = torch.tensor(labels)
    train, valid = torch.tensor(~is_valid), torch.tensor(is_valid)
    return hashed((images[train], classes[train]), (images[valid], classes[valid]))
