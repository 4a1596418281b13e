"""Norm, inner-product and orthogonality test: how far the gradient of one batch can be trusted.

Shapes: N = examples of the step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from instruments.gradient._estimates import jackknife, require_examples, trace_of
from instruments.instrument import Estimate, Gauge, Output, Values
from instruments.view import Need, View

INNER_CUT = 0.9**2
ACROSS_CUT = 5.84**2  # given as tan 80 degrees, which is 5.67


@dataclass(frozen=True)
class GradientTests(Gauge):
    """Relative variance of the batch gradient g_B, whole, along itself and across itself.

    With A = sum |g_i|^2 over the N examples and unbiased (N - 1) variances,

        norm           theta^2    = S^2 / (N |g_B|^2),               S^2 = (A - N |g_B|^2) / (N - 1)
        inner_product  theta_in^2 = Var(<g_i, g_B>) / (N |g_B|^4)
        orthogonality  nu^2       = sum |g_i - <g_i, g_B>/|g_B|^2 g_B|^2 / ((N - 1) N |g_B|^2)

    and theta^2 = theta_in^2 + nu^2 exactly. The norm test asks for theta <= a constant below 1. The inner-product test
    asks for less, a step downhill: theta_in <= 0.9, and nu <= 5.84, about 80 degrees, lest it strays too far sideways.

    |g_B|^2 contains the noise of the batch itself, so theta^2 is about x/(1 + x) of x = B_simple/N and saturates near 1
    where there is nothing but noise. `relative_noise` is x = theta^2 / (1 - theta^2) = S^2 / (N G^2), the noise scale
    in batches, from this batch alone: infinite where theta^2 >= 1, and noisy (gradient/noise_scale pools). Standard
    errors are the jackknife over the examples, unknown below three; those of the two parts would need all pairs of
    examples. A gradient that is exactly zero has no direction: NaN.
    """

    outputs: ClassVar[Mapping[str, Output]] = {
        "norm": Output("1", "theta^2 = S^2 / (N |g_B|^2): variance of the batch gradient over its square", edge=1.0),
        "inner_product": Output("1", "theta_in^2, the part along g_B; the test asks for at most 0.9^2", edge=INNER_CUT),
        "orthogonality": Output("1", "nu^2, the part across g_B; the test asks for at most 5.84^2", edge=ACROSS_CUT),
        "relative_noise": Output("batches", "theta^2 / (1 - theta^2): noise scale over batch size", edge=1.0),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"samples", "inner_products"})
    reference: ClassVar[str] = (
        "Byrd et al. 2012, Sample size selection in optimization methods for machine learning, eq. 3.6; "
        "Bollapragada, Byrd and Nocedal 2018, Adaptive sampling strategies for stochastic optimization"
    )

    def price(self, view: View) -> float:
        return view.sample_pass + 2 / 3

    def read(self, view: View) -> Values:
        moments = view.moments
        n = require_examples(moments, 2)
        assert moments.inner_NL is not None
        inner_N = moments.inner_N
        a, q = moments.sum_of_squares_L.sum(), moments.square_of_sum_L.sum()
        left_out = *moments.left_out_totals, n - 1
        with np.errstate(divide="ignore", invalid="ignore"):
            square = q / n**2
            across = (a - inner_N @ inner_N / square) / (n - 1)
            deviation_N = inner_N - inner_N.sum() / n
            return {
                "norm": Estimate(float(norm_test(a, q, n)), jackknife(norm_test(*left_out))),
                "inner_product": float(deviation_N @ deviation_N / (n - 1) / (n * square**2)),
                "orthogonality": float(across / (n * square)),
                "relative_noise": Estimate(float(relative_noise(a, q, n)), jackknife(relative_noise(*left_out))),
            }


def norm_test(a: Any, q: Any, n: int) -> Any:
    """theta^2 of n examples from A and Q = |sum g_i|^2; NaN without a second example."""
    return n * trace_of(a, q, n) / q if n > 1 else a * np.nan


def relative_noise(a: Any, q: Any, n: int) -> Any:
    """x = theta^2 / (1 - theta^2), infinite from theta^2 = 1 on."""
    norm = norm_test(a, q, n)
    return np.where(norm >= 1, np.inf, norm / (1 - norm))
