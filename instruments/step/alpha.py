"""Where on its parabola the step landed, with the doubt that the examples of the batch leave.

Shapes: N = examples of the step.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from instruments.instrument import Estimate, Gauge, Output, Values
from instruments.view import Need, View

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Alpha(Gauge):
    """alpha of the step u that the optimizer took, whatever the optimizer, by example on the step's own batch.

    The parabola f(t) = a + b t + c t^2 goes through the loss before (t = 0), the loss after (t = 1) and the slope
    before, each a mean over the same N examples:

        a = mean f_i(theta),    b = mean <g_i, u>,    c = mean (f_i(theta + u) - f_i(theta) - <g_i, u>),
        alpha = 2 c / (-b) - 1:    -1 no move, 0 at the minimum, 1 mirrored to the other side.

    Three measurements determine three coefficients, so weighting them by their inverse variances, as Cockpit weights
    the four of its fit, would change nothing. Noise enters where it cannot cancel, in how the examples differ in slope
    and curvature; what they differ by in loss drops out of c, pair by pair. The standard error of alpha is the
    jackknife over the examples, u held fixed: how far alpha would move with other examples of the kind in this batch.
    It is not the gap between this batch and a fresh one. A fit through two successive batches has
    E alpha = eta kappa + theta^2 - 1 (kappa the curvature along the step, theta^2 the norm test) and calls a tiny step
    in much noise perfect; here the same batch, masks and mode stand at both ends, and theta^2 does not enter.

    A concave fit (c <= 0) has no minimum: alpha is then -1 or less, and `concave` tells it from a tiny step. A step
    that does not go downhill (b >= 0) has alpha NaN and sets `uphill`. Where no example has a slope (a step of length
    zero, as a warm-up may begin with, or no gradient), and where the fit is NaN, alpha and both flags are NaN. For the
    value alone `step/step_ratio` is cheaper.
    """

    outputs: ClassVar[Mapping[str, Output]] = {
        "alpha": Output("1", "where the step landed on its parabola: -1 no move, 0 minimum, 1 mirrored", edge=0.0),
        "slope": Output("loss", "b, change of the loss predicted to first order; its error is that of a mean"),
        "curvature": Output("loss", "2 c, which is u'Hu for a parabola; its error is that of a mean"),
        "concave": Output("1", "1 where the fit bends downwards or not at all (c <= 0), else 0"),
        "uphill": Output("1", "1 where the step does not go downhill (b >= 0), so that alpha is not defined, else 0"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"step_examples"})
    reference: ClassVar[str] = (
        "Schneider, Dangel and Hennig 2021, Cockpit, section 3.2; here by both ends of one step on one batch"
    )

    def price(self, view: View) -> float:
        return 7 / 3

    def read(self, view: View) -> Values:
        examples = view.step_examples
        losses_3N = torch.stack([examples.slope_N, examples.after_N, examples.before_N]).double().cpu().numpy()
        slope_N, bend_N = losses_3N[0], losses_3N[1] - losses_3N[2] - losses_3N[0]
        slope, bend = _mean(slope_N), _mean(bend_N)
        b, c = float(slope.value), float(bend.value)
        known = bool(slope_N.any()) and not math.isnan(b + c)
        return {
            "alpha": Estimate(float(alpha(b, c)), _jackknife(slope_N, bend_N)),
            "slope": slope,
            "curvature": Estimate(2 * c, 2 * float(bend.stderr)),
            "concave": float(c <= 0) if known else math.nan,
            "uphill": float(b >= 0) if known else math.nan,
        }


def alpha(slope: Any, bend: Any) -> Any:
    """2 c / (-b) - 1 for slope b and bend c; NaN where the slope is not negative."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(slope < 0, 2 * bend / -np.asarray(slope) - 1, np.nan)


def _jackknife(slope_N: Array, bend_N: Array) -> float:
    """Standard error of alpha: each example is left out once. NaN for one example, infinite where leaving one out turns
    the slope uphill."""
    n = len(slope_N)
    if n < 2:
        return math.nan
    left_slope_N, left_bend_N = ((x_N.sum() - x_N) / (n - 1) for x_N in (slope_N, bend_N))
    if slope_N.sum() < 0 and (left_slope_N >= 0).any():
        return math.inf
    alpha_N = alpha(left_slope_N, left_bend_N)
    away_N = alpha_N - alpha_N.sum() / n
    return math.sqrt((n - 1) / n * float(away_N @ away_N))


def _mean(x_N: Array) -> Estimate:
    n, mean = len(x_N), float(x_N.sum() / len(x_N))
    away_N = x_N - mean
    return Estimate(mean, math.sqrt(float(away_N @ away_N) / (n - 1) / n) if n > 1 else math.nan)
