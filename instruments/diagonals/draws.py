"""A diagonal that was estimated several times over, or is exact.

Shapes: D = size of the matrix, M = draws.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """`rows_MD` are M independent unbiased estimates of one diagonal; a single row is the diagonal itself, exact.

    Entries of one row err together, because all of them come from the same drawn targets. So the error of anything made
    of them is found from its M values, never from errors of single entries. `engine` says who computed them.
    """

    rows_MD: Tensor
    engine: str

    @property
    def count(self) -> int:
        return len(self.rows_MD)

    @cached_property
    def values_D(self) -> Tensor:
        """The mean of the rows."""
        return self.rows_MD.mean(0)

    def sums(self, pieces: Sequence[Sequence[slice]]) -> tuple[Tensor, Tensor]:
        """Sum of the diagonal over each list of slices, and its standard error over the draws."""
        columns = [
            torch.stack([self.rows_MD[:, s].sum(1, dtype=torch.float64) for s in some]).sum(0) for some in pieces
        ]
        sums_MP = torch.stack(columns, 1)
        value_P = sums_MP.mean(0)
        if self.count == 1:
            return value_P, torch.zeros_like(value_P)
        return value_P, sums_MP.std(0) / self.count**0.5

    def jackknife(self, form: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """A function of the diagonal with its bias of order 1/M taken out, and its standard error.

        With t the value at the mean of all rows and t_m that at the mean without row m: M t - (M - 1) mean t_m, and
        the root of (M - 1)/M sum (t_m - mean t_m)^2 (Efron and Stein 1981, "The jackknife estimate of variance").
        """
        whole = form(self.values_D)
        m = self.count
        if m == 1:
            return whole, torch.zeros_like(whole)
        rest_M = torch.stack([form((m * self.values_D - row_D) / (m - 1)) for row_D in self.rows_MD])
        error = ((m - 1) / m * (rest_M - rest_M.mean()).square().sum()).sqrt()
        return m * whole - (m - 1) * rest_M.mean(), error
