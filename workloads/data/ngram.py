"""An n-gram model of bytes: the reference that a language model's loss is measured against.

Interpolation of all orders by a hierarchical Dirichlet prior (MacKay and Peto, Natural Language Engineering 1, 1995):

    p_k(c | h) = (n(h c) + kappa p_{k-1}(c | h')) / (n(h) + kappa),    p_{-1} = 1/256,

where h are the k bytes before c, h' is h without its earliest byte, and n counts the training text.

Legend: n bytes of text, P = n - order positions that have a full context.
"""

import numpy as np
from numpy.typing import NDArray

from workloads.data.text import VOCABULARY

Bytes = NDArray[np.uint8]
KAPPA = 16.0


def ngram_cross_entropy(train_n: Bytes, valid_n: Bytes, *, order: int, kappa: float = KAPPA) -> float:
    """Mean of -log p_order(c | h) over the bytes of `valid_n` that have `order` bytes before them, in nats per byte.

    The model is counted on `train_n`. `kappa` is how many observations a context needs to weigh as much as all
    shorter ones together. Raises ValueError if a text has no full context.
    """
    for part, text_n in (("train", train_n), ("valid", valid_n)):
        if len(text_n) <= order:
            raise ValueError(
                f"expected more than {order} bytes of {part} text, got {len(text_n)}; give more text or a lower order"
            )
    p_P = np.full(len(valid_n) - order, 1 / VOCABULARY)
    for k in range(order + 1):
        pairs_P, seen_P = _codes(train_n, order, k + 1), _codes(valid_n, order, k + 1)
        pair_counts_P = _count(pairs_P, seen_P)
        context_counts_P = _count(pairs_P // VOCABULARY, seen_P // VOCABULARY)
        p_P = (pair_counts_P + kappa * p_P) / (context_counts_P + kappa)
    return float(-np.log(p_P).mean())


def _codes(text_n: Bytes, order: int, length: int) -> NDArray[np.int64]:
    """The last `length` bytes up to every position from `order` on, read as one number to the base 256."""
    codes_P = np.zeros(len(text_n) - order, dtype=np.int64)
    for back in range(length - 1, -1, -1):
        codes_P = codes_P * VOCABULARY + text_n[order - back : len(text_n) - back]
    return codes_P


def _count(train_P: NDArray[np.int64], seen_P: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each seen code occurs among the training codes."""
    train_P = np.sort(train_P)
    return np.searchsorted(train_P, seen_P, side="right") - np.searchsorted(train_P, seen_P, side="left")
