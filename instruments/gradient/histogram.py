"""Histogram of the elements of the gradient, and what float16 would lose of them.

Shapes: S = sampled elements, K = bins.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np

from instruments.gradient._bins import Array, Mask, Powers, adaptive_limits, histogram, strided_sample
from instruments.gradient._tensors import dense, largest, nonzero, require_gradient
from instruments.instrument import Estimate, Gauge, Output, Values
from instruments.view import Need, View

Bins = Literal["fixed", "adaptive"]
FIXED = (-40.0, 12.0, 27)  # powers of two from 9e-13 to 4096, one limit every factor of four
PER_SIGN = 20  # limits of adaptive bins to each side of zero
SMALLEST_HALF, LARGEST_HALF = 2.0**-24, 65504.0  # least subnormal and greatest number of float16


@dataclass(frozen=True)
class Histogram(Gauge):
    """Counts of the elements of `.grad` in bins that are logarithmic to both sides of zero.

    Gradients span many decades, so bins of equal width put nearly everything into two of them. "fixed" bins are 55, a
    factor of four wide from 9e-13 to 4096, the same at every reading: the log holds the history, and columns can be
    compared. "adaptive" bins are 41 between the 1 % and the 99 % quantile of the sizes at this reading, in powers of
    two, and show the shape more finely. The middle bin holds zeros and what is closer to zero than the bins reach, the
    outer ones all that is beyond; nothing is cut off. NaN is counted nowhere but in `not_finite`.

    The counts are of a sample of about `sample` elements, every s-th of each tensor and never fewer than one, taken on
    the device without random numbers; small tensors are therefore a little over-represented. Shares estimated from it
    have a binomial standard error. `zeros` and `largest` are exact, over all elements.

    The gradient is read without its loss scale. `underflow` is what float16 rounds to zero or to its subnormals' last
    bit, non-zero in the precision it was computed in: above a few per cent a loss scale is due, and `overflow` says how
    much room there is for one. A gradient computed in float16 has lost these elements already: they are in `zeros`.
    """

    bins: Bins = "fixed"
    sample: int = 2**14

    outputs: ClassVar[Mapping[str, Output]] = {
        "histogram": Output("loss / parameter", "counts of sampled gradient elements by size and sign", "histogram"),
        "zeros": Output("1", "share of elements that are exactly zero, of all elements"),
        "largest": Output("loss / parameter", "largest size of an element, of all elements; NaN if one is"),
        "underflow": Output("1", "share that is not zero and below 6e-8, float16's least subnormal"),
        "overflow": Output("1", "share above 65504, float16's greatest number, infinities included"),
        "not_finite": Output("1", "share that is NaN or infinite"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"gradient"})
    reference: ClassVar[str] = "Micikevicius et al. 2018, Mixed precision training, section 3.2 and figure 3"

    def __post_init__(self) -> None:
        if self.bins not in get_args(Bins):
            raise ValueError(f"expected bins to be one of {', '.join(get_args(Bins))}, got {self.bins!r}.")
        if self.sample < 1:
            raise ValueError(f"expected a sample of at least one element, got {self.sample}.")

    def price(self, view: View) -> float:
        return 0.05

    def read(self, view: View) -> Values:
        require_gradient(view.grads)
        grads = [dense(g) for g in view.grads if g is not None and g.numel()]
        sample_S = strided_sample(grads, self.sample)
        total, powers = sum(g.numel() for g in grads), Powers(sample_S)
        left_out = 1 - len(sample_S) / total

        def estimated(p: float) -> Estimate:
            return Estimate(p, (p * (1 - p) / len(sample_S) * left_out) ** 0.5)

        adaptive = self.bins == "adaptive"
        return {
            "histogram": histogram(sample_S, adaptive_limits(sample_S, PER_SIGN))
            if adaptive
            else powers.histogram(*FIXED),
            "zeros": 1 - nonzero(grads) / total,
            "largest": largest(grads),
            "underflow": estimated(powers.share(_underflows)),
            "overflow": estimated(float((sample_S.abs() > LARGEST_HALF).double().mean())),
            "not_finite": estimated(powers.share(_not_finite)),
        }


def _underflows(size: Array) -> Mask:
    return (size > 0) & (size < SMALLEST_HALF)


def _not_finite(size: Array) -> Mask:
    return ~np.isfinite(size)
