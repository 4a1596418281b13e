"""One fixed symmetric matrix, known by its products with a vector."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor


class Operator(ABC):
    """Abstract: a symmetric D x D matrix. Two products with the same vector agree bit for bit.

    `price` is what one product costs in g (gradients on the same batch); `route` says in words how it is computed, for
    the provenance of what is read from it.
    """

    size: int
    dtype: torch.dtype
    device: torch.device
    price: float = 0.0
    route: str = "given"

    @abstractmethod
    def matvec(self, v_D: Tensor) -> Tensor:
        """The product A v, shape (D,)."""

    def known(self) -> Sequence[tuple[Tensor, Tensor]]:
        """Pairs (v, A v) that were computed before and are still held; none unless an operator remembers."""
        return ()


class DenseOperator(Operator):
    """A matrix that is held: the ground truth of small problems."""

    def __init__(self, matrix_DD: Tensor) -> None:
        self._matrix_DD = matrix_DD
        self.size, self.dtype, self.device = matrix_DD.shape[0], matrix_DD.dtype, matrix_DD.device
        self.route = "dense"

    def matvec(self, v_D: Tensor) -> Tensor:
        return self._matrix_DD @ v_D


def released() -> ValueError:
    """What an operator raises after its `release()`."""
    return ValueError(
        "expected an operator of the present step, got one that was released: its graphs are gone, and the parameters "
        "may have moved on; ask the probe of this step for one."
    )


def random_unit(operator: Operator, seed: int) -> Tensor:
    """A Gaussian vector of norm 1 that depends on the seed alone, not on the device or any global generator."""
    v_D = torch.randn(operator.size, generator=torch.Generator().manual_seed(seed), dtype=operator.dtype)
    unit_D: Tensor = (v_D / v_D.norm()).to(operator.device)
    return unit_D
