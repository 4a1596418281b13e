"""What several instruments do with the gradients in `.grad` as they stand.

Shapes: L = trained parameter tensors.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from instruments.layout import PIECE
from instruments.refusal import Refusal


def require_gradient(grads: Sequence[Tensor | None]) -> None:
    """A Refusal where no parameter has a gradient."""
    if all(g is None for g in grads):
        raise Refusal("no parameter has a gradient; observe() belongs after backward() and before zero_grad().")


def dense(t: Tensor) -> Tensor:
    """The tensor without its graph and, if it was sparse, with its zeros."""
    t = t.detach()
    return t if t.layout is torch.strided else t.to_dense()


def nonzero(tensors: Sequence[Tensor]) -> int:
    """How many elements are not zero; NaN is not zero."""
    if tensors[0].device.type == "cpu" and all(t.dtype in (torch.float32, torch.float64) for t in tensors):
        return sum(int(np.count_nonzero(t.numpy() != 0)) for t in tensors)  # a third of torch's own time
    return int(sum(torch.count_nonzero(t).to(tensors[0].device) for t in tensors))


def largest(tensors: Sequence[Tensor]) -> float:
    """Largest size of an element; NaN if one is. One synchronisation."""
    extremes = [e for t in tensors for e in torch.aminmax(t)]
    if len({(t.device, t.dtype) for t in tensors}) > 1:
        extremes = [e.to(tensors[0].device, torch.float64) for e in extremes]
    return float(torch.stack(extremes).abs().max())


def cosines(one: Sequence[Tensor], other: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Cosine between two lists of L tensors as one vector each, and of each pair, (L,); NaN where one of them is zero.

    Summed in float64, so that tiny gradients do not vanish when they are squared. Raises Refusal for complex tensors.
    """
    if any(t.is_complex() for t in (*one, *other)):
        raise Refusal("complex numbers have no angle here; readings of them are not supported.")
    sums_3L = torch.stack([_products(a, b).to(one[0].device) for a, b in zip(one, other, strict=True)], 1)
    dot_L, a_L, b_L = sums_3L
    return dot_L.sum() / (a_L.sum() * b_L.sum()).sqrt(), dot_L / (a_L * b_L).sqrt()


def _products(a: Tensor, b: Tensor) -> Tensor:
    """(3,): <a, b>, |a|^2 and |b|^2, a piece at a time, since copies in float64 that fit into a cache are quick."""
    sums = []
    for piece_a, piece_b in zip(*(torch.split(t.reshape(-1), PIECE) for t in (a, b)), strict=True):
        x, y = piece_a.double(), piece_b.double()
        sums.append(torch.stack([torch.dot(x, y), torch.dot(x, x), torch.dot(y, y)]))
    return torch.stack(sums).sum(0)
