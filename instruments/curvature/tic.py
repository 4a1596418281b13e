"""Takeuchi's information criterion: gradient noise measured in units of curvature.

Shapes: N = examples of the step, D = trainable scalars.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from instruments.curvature._matrix import Matrix, at_least, need_only, operator_of, price_of
from instruments.instrument import Estimate, Gauge, Output, Values
from instruments.linalg.trace import Diagonal, diagonal
from instruments.view import Need, View

FLOOR = 1e-3  # of the median of the positive entries


@dataclass(frozen=True)
class Tic(Gauge):
    """tr(H^-1 C), which estimates N times the gap between training and test loss at a minimum, by two substitutes.

    C = mean g_i g_i' (uncentred) is that of the examples of the step, h_j = H_jj that of the held batches, by
    Hutchinson's estimate of the diagonal (mean of x * Hx over random signs x):

        tic_trace = tr C / tr H,        tic_diagonal = sum_j C_jj / max(h_j, f),

    f = 0.001 of the median of the positive h_j. Where H and C are multiples of one another both are right for the
    trace form up to the factor D: tic_trace counts directions of mean noise, tic_diagonal adds up coordinates. The
    theory is that of a minimum of a well specified model; during training read trends only.

    H is the Gauss-Newton matrix unless told otherwise: entries of the Hessian are negative at places, where the
    criterion means nothing. The errors: of tr C over examples and of tr H over probes for the first; for the second
    that of h_j alone, to first order, which leaves out C, and that 1/h is larger on average than 1/(mean h): with
    noisy entries tic_diagonal is too large. `floored` says how often f took the place of an entry; above some percent
    tic_diagonal is f more than data, and more `probes` are needed. Coordinates without any gradient add nothing. NaN
    where no entry of h is positive, or tr H is not.

    The original Cockpit divides by exact diagonal entries of the Hessian plus 1e-7, which may be negative or tiny, so
    that single coordinates decide the sum; and it takes both from the same mini-batch.
    """

    matrix: Matrix = "gauss_newton"
    probes: int = 16

    outputs: ClassVar[Mapping[str, Output]] = {
        "tic_trace": Output("1 / loss", "tr C / tr H: noise over curvature, both summed first"),
        "tic_diagonal": Output("1 / loss", "sum of C_jj / H_jj over coordinates, entries of H floored"),
        "floored": Output("1", "share of the coordinates with a gradient whose entry of H was floored", edge=0.0),
        "trace_of_second_moment": Output("(loss / parameter)²", "tr C, mean squared norm of the gradients of examples"),
        "trace_of_curvature": Output("loss / parameter²", "tr H on the held batches"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"samples", "second_moment", "gauss_newton"})
    reference: ClassVar[str] = (
        "Thomas et al. 2020, On the interplay between noise and curvature and its effect on optimization and "
        "generalization, section 5; diagonal: Bekas, Kokiopoulou and Saad 2007, An estimator for the diagonal of a "
        "matrix"
    )

    def __post_init__(self) -> None:
        need_only(self, self.matrix)
        at_least("probes", self.probes, 2)

    def price(self, view: View) -> float:
        return 5 / 3 + price_of(self.matrix, self.probes)

    def read(self, view: View) -> Values:
        moments = view.moments
        assert moments.second_D is not None
        norms_sq_N = moments.norms_sq_NL.double().sum(1)
        noise, noise_error = norms_sq_N.mean(), norms_sq_N.std() / len(norms_sq_N) ** 0.5
        examples = view.meter.provenance["examples"]
        found = diagonal(operator_of(view, self.matrix), probes=self.probes, seed=view.step)
        view.meter.provenance.update(batch="step and held", examples=examples)
        (trace,), (trace_error,) = found.sums([[slice(0, len(found.values_D))]])
        ratio = torch.where(trace > 0, noise / trace, torch.nan)
        relative = torch.hypot(noise_error / noise, trace_error / trace)
        diagonal_form, floored = by_coordinate(moments.second_D, found)
        return {
            "tic_trace": Estimate(ratio, ratio * relative),
            "tic_diagonal": diagonal_form,
            "floored": floored,
            "trace_of_second_moment": Estimate(noise, noise_error),
            "trace_of_curvature": Estimate(trace, trace_error),
        }


def by_coordinate(second_D: Tensor, found: Diagonal) -> tuple[Estimate, Tensor]:
    """sum C_jj / max(h_j, f) with the error of h, and the share of entries floored among those with a gradient."""
    h_D, second_D = found.values_D.double(), second_D.to(found.values_D.device).double()
    moved_D = second_D > 0
    positive = h_D[moved_D & (h_D > 0)]
    if not len(positive):
        return Estimate(torch.nan, torch.nan), torch.where(h_D.isnan().any(), torch.nan, 1.0 - 0.0 * h_D.sum())
    floor = FLOOR * positive.median()
    low_D = h_D < floor
    terms_D = second_D / torch.where(low_D, floor, h_D)
    slopes_D = torch.where(low_D, 0.0, terms_D / torch.where(low_D, floor, h_D))
    error = torch.sqrt(2 * (slopes_D.square() * found.variances_D.double()).sum())
    return Estimate(terms_D.sum(), error), (low_D & moved_D).sum() / moved_D.sum()
