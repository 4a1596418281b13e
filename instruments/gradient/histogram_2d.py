"""Joint histogram of gradient element and parameter value.

Shapes: S = sampled elements, R = bins of the parameter, C = bins of the gradient.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from instruments.gradient._bins import adaptive_limits, bin_of, strided_sample
from instruments.gradient._tensors import dense, require_gradient
from instruments.instrument import Gauge, Output, Values
from instruments.view import Need, View

PER_SIGN = 12  # limits to each side of zero


@dataclass(frozen=True)
class Histogram2d(Gauge):
    """How many elements have a gradient of this size and a value of that size, with both marginals.

    `grid` is an array of shape (R + 1, C + 1): [0, 1:] are the upper limits of the C bins of the gradient element,
    [1:, 0] those of the R bins of the parameter value, [1:, 1:] the counts, [0, 0] is NaN. Limits ascend as in a
    histogram: the first bin of an axis counts all at or below its limit, the last limit is infinite. The marginals
    `gradient` and `parameter` are the sums of the counts, as histograms of shape (2, C) and (2, R).

    Bins are logarithmic to both sides of zero, between the 1 % and the 99 % quantile of the sizes at this reading in
    powers of two; 25 an axis. Look for mass beside the axes: values that are large and get no gradient (dead units,
    saturated gates), gradients that sit on values near zero (what is being built up), a gradient whose sign follows
    that of the value (decay in the loss). Parameters without a gradient are left out, and so are pairs with NaN.

    The counts are of about `sample` elements, every s-th of each tensor and never fewer than one, the same places in
    gradient and parameter, without random numbers.
    """

    sample: int = 2**16

    outputs: ClassVar[Mapping[str, Output]] = {
        "grid": Output("1", "counts of sampled elements by parameter value (rows) and gradient (columns)", "grid"),
        "gradient": Output("loss / parameter", "marginal: counts by gradient element", "histogram"),
        "parameter": Output("parameter", "marginal: counts by parameter value", "histogram"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"gradient", "parameters"})
    reference: ClassVar[str] = "Schneider, Dangel and Hennig 2021, Cockpit; here with bins that follow the data"

    def __post_init__(self) -> None:
        if self.sample < 1:
            raise ValueError(f"expected a sample of at least one element, got {self.sample}.")

    def price(self, view: View) -> float:
        return 0.05

    def read(self, view: View) -> Values:
        require_gradient(view.grads)
        pairs = [(dense(g), p) for g, p in zip(view.grads, view.parameters, strict=True) if g is not None and p.numel()]
        g_S, p_S = (strided_sample(tensors, self.sample) for tensors in zip(*pairs, strict=True))
        known_S = ~(g_S.isnan() | p_S.isnan())
        g_S, p_S = g_S[known_S], p_S[known_S]
        across_C, down_R = adaptive_limits(g_S, PER_SIGN), adaptive_limits(p_S, PER_SIGN)
        counts_RC = joint_counts(p_S, g_S, down_R, across_C)
        top = torch.cat([across_C.new_tensor([torch.nan]), across_C])
        return {
            "grid": torch.cat([top[None], torch.cat([down_R[:, None], counts_RC], 1)]),
            "gradient": torch.stack([across_C, counts_RC.sum(0)]),
            "parameter": torch.stack([down_R, counts_RC.sum(1)]),
        }


def joint_counts(down_S: Tensor, across_S: Tensor, down_R: Tensor, across_C: Tensor) -> Tensor:
    """(R, C): how many pairs fall into each pair of bins."""
    rows, columns = len(down_R), len(across_C)
    cell_S = bin_of(down_S, down_R) * columns + bin_of(across_S, across_C)
    return torch.bincount(cell_S, minlength=rows * columns).view(rows, columns).double()
