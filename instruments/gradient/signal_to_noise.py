"""Signal-to-noise ratio of the gradient, coordinate by coordinate.

Shapes: N = examples of the step, D = trainable scalars, L = trained parameter tensors.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from instruments.gradient._estimates import jackknife, lowest_median, require_examples, shares, trace_of
from instruments.instrument import Estimate, Gauge, Output, Values
from instruments.view import Need, View

NAN = float("nan")


@dataclass(frozen=True)
class SignalToNoise(Gauge):
    """How much of the gradient is signal: (E g)^2 / Var(g), with the share of the noise in the mean taken out.

    With the mean gbar_j and the unbiased variance s_j^2 of coordinate j over the N examples of the batch,

        r_j = (gbar_j^2 - s_j^2 / N) / s_j^2,

    whose numerator is unbiased for (E g_j)^2; without the correction r_j has the floor 1/N (and its mean 1/(N - 3))
    where there is no signal at all. Under pure noise r_j is negative for two coordinates in three, and so is the
    median, by about -0.55/N. `aggregate` is the ratio of the sums over coordinates, |G|^2 / tr(Sigma), the inverse of
    the noise scale; its standard error is the jackknife over the examples. Coordinates without variance (a unit that is
    dead for the whole batch, or all rounding) are left out and counted. No constant is added to the denominator. Where
    a gradient is not finite, all values are NaN but those of layers that are.
    """

    outputs: ClassVar[Mapping[str, Output]] = {
        "aggregate": Output("1", "sum of signal over sum of noise: (|g|^2 - S^2/N) / S^2; may be negative"),
        "median": Output("1", "median over the coordinates of the de-biased ratio; may be negative"),
        "per_layer": Output("1", "the aggregate of each parameter tensor; NaN for one without gradient", "per-layer"),
        "silent": Output("1", "share of coordinates without variance in this batch"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"samples", "second_moment", "inner_products"})
    reference: ClassVar[str] = (
        "Liu et al. 2020, Understanding why neural networks generalize well through GSNR of parameters, eq. 1; "
        "here without the bias of the plug-in estimate"
    )

    def price(self, view: View) -> float:
        return view.sample_pass + 1.0

    def read(self, view: View) -> Values:
        moments = view.moments
        n = require_examples(moments, 2)
        share_D, _, heard, silent = shares(moments)
        median = lowest_median(share_D, heard) if heard and not math.isnan(silent) else NAN
        a_L, q_L = moments.sum_of_squares_L, moments.square_of_sum_L
        with np.errstate(divide="ignore", invalid="ignore"):
            (left_A_N, left_Q_N), m = moments.left_out_totals, n - 1
            noise_L = trace_of(a_L, q_L, n)
            signal_L = q_L / n**2 - noise_L / n
            left_out_N = left_A_N * NAN
            if n > 2:
                left_out_N = (left_Q_N - left_A_N) / (m * (m - 1)) / trace_of(left_A_N, left_Q_N, m)
            return {
                "aggregate": Estimate(float(signal_L.sum() / noise_L.sum()), jackknife(left_out_N)),
                "median": median / (1 - median) * (n - 1) / n - 1 / n,
                "per_layer": signal_L / noise_L,
                "silent": silent,
            }
