"""Gradient noise scale, which is the critical batch size, and norm test, from norms of per-example gradients.

Shapes: N = examples of the step, K = readings pooled, L = trained parameter tensors.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from instruments.gradient._estimates import Array, require_examples
from instruments.instrument import Estimate, Instrument, Output, State, Values
from instruments.view import Need, View

WIDTH = 2.0  # standard errors to either side of an interval


@dataclass(frozen=True)
class NoiseScale(Instrument):
    """How noisy the mini-batch gradient is, in examples.

    With A = sum |g_i|^2 and Q = |sum g_i|^2 over the N examples of a batch, unbiased for the trace of the gradient
    covariance and for the squared norm of the full gradient are

        S^2 = (A - Q/N) / (N - 1),      G^2 = (Q - A) / (N (N - 1)),

    and B_simple = tr(Sigma) / |G|^2 is estimated by the ratio of their sums over the last `pool` readings, never by an
    average of ratios. Its standard error is the jackknife over those readings: unknown (NaN) at the first.

    B_simple is the critical batch size: steps and examples to a given loss go as S = S_min (1 + B_simple/B) and
    E = E_min (1 + B/B_simple). At B = B_simple both are twice their least; far above it larger batches save hardly any
    steps, far below it smaller ones save hardly any examples.

    G^2 of one batch may be negative; when the pooled one is, `noise_scale` is infinite. What the data do say then is
    `at_least`: the limits are Fieller's, two standard errors wide, so where the interval of the pooled G^2 contains 0
    the upper one is infinite and the lower one holds. Pooling takes the readings as one state of training: with few of
    them, or a scale that grows while they are taken, the limits are too narrow. `per_layer` pools each parameter tensor
    by itself. A gradient that is not finite stays out of the pool, and what is pooled reads NaN at that step. The norm
    test is theta^2 = S^2 / (N |g_B|^2), about x/(1 + x) for x = B_simple/N.
    """

    pool: int = 20

    outputs: ClassVar[Mapping[str, Output]] = {
        "noise_scale": Output("examples", "pooled tr(Sigma) / |G|^2: batches far below it are mostly noise"),
        "at_least": Output("examples", "lower limit of the noise scale, two standard errors; holds where G^2 may be 0"),
        "at_most": Output("examples", "upper limit; infinite where the interval of the pooled G^2 contains 0"),
        "per_layer": Output("examples", "the pooled noise scale of each parameter tensor", "per-layer"),
        "norm_test": Output("1", "theta^2 = S^2 / (N |g_B|^2) of this batch; 1 means all noise", edge=1.0),
        "sum_of_squared_norms": Output("(loss / parameter)²", "A = sum over examples of |g_i|^2"),
        "squared_norm_of_sum": Output("(loss / parameter)²", "Q = |sum over examples of g_i|^2"),
        "trace_of_covariance": Output("(loss / parameter)²", "S^2, unbiased for tr(Sigma), of this batch"),
        "squared_gradient": Output("(loss / parameter)²", "G^2, unbiased for |G|^2, of this batch; may be negative"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"samples"})
    reference: ClassVar[str] = (
        "McCandlish et al. 2018, An empirical model of large-batch training, section 2.2 and appendix A.1; "
        "norm test: Byrd et al. 2012, Sample size selection in optimization methods, eq. 3.6; "
        "limits of a ratio: Fieller 1954, Some problems in interval estimation"
    )

    def price(self, view: View) -> float:
        return view.sample_pass + 1 / 3

    def init(self) -> State:
        return {"pairs": None}

    def advance(self, view: View, state: State) -> tuple[Values, State]:
        moments = view.moments
        n = require_examples(moments, 2)
        a_L, q_L = moments.sum_of_squares_L, moments.square_of_sum_L
        pair_2L = np.stack([(a_L - q_L / n) / (n - 1), (q_L - a_L) / (n * (n - 1))])
        known, pairs_K2L = state["pairs"], pair_2L[None][:0]
        if isinstance(known, Tensor) and known.shape[2:] == a_L.shape:
            pairs_K2L = known.numpy()
        finite = np.isfinite(pair_2L).all()
        if finite:
            pairs_K2L = np.concatenate([pairs_K2L, pair_2L[None]])[-self.pool :]
        pooled_K2L = pairs_K2L if finite else pairs_K2L[:0]
        a, q = float(a_L.sum()), float(q_L.sum())
        trace, squared = pair_2L.sum(1).tolist()
        totals_K2 = pooled_K2L.sum(2)
        lower, upper = limits(totals_K2)
        values: Values = {
            "noise_scale": pooled_ratio(totals_K2),
            "at_least": lower,
            "at_most": upper,
            "per_layer": pooled_by_layer(pooled_K2L),
            "norm_test": trace * n / q if q > 0 else float("nan"),
            "sum_of_squared_norms": a,
            "squared_norm_of_sum": q,
            "trace_of_covariance": trace,
            "squared_gradient": squared,
        }
        return values, {"pairs": torch.from_numpy(pairs_K2L)}


def pooled_ratio(pairs_K2: npt.ArrayLike) -> Estimate:
    """sum S^2 / sum G^2 with its jackknife standard error over the pooled readings."""
    pairs = np.asarray(pairs_K2, dtype=float)
    if not len(pairs):
        return Estimate(float("nan"), float("nan"))
    total = pairs.sum(0)
    if total[1] <= 0:
        return Estimate(float("inf"), float("nan"))
    k = len(pairs)
    if k < 2:
        return Estimate(float(total[0] / total[1]), float("nan"))
    left_out = total - pairs
    if (left_out[:, 1] <= 0).any():
        return Estimate(float(total[0] / total[1]), float("inf"))
    ratios = left_out[:, 0] / left_out[:, 1]
    variance = (k - 1) / k * np.square(ratios - ratios.mean()).sum()
    return Estimate(float(total[0] / total[1]), float(np.sqrt(variance)))


def pooled_by_layer(pairs_K2L: Array) -> Array:
    """(L,): sum S^2 / sum G^2 of each parameter tensor; infinite where G^2 is not positive, NaN where both are zero."""
    trace_L, squared_L = pairs_K2L.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio_L = np.where(squared_L > 0, trace_L / squared_L, np.inf)
    return np.where((trace_L == 0) & (squared_L == 0), np.nan, ratio_L)


def limits(pairs_K2: npt.ArrayLike) -> tuple[float, float]:
    """Fieller's limits of E S^2 / E G^2: all B for which S^2 - B G^2 is within two standard errors of 0.

    They are the roots of a B^2 - 2 b B + c with a = G^2^2 - w^2 var(G^2), b = S^2 G^2 - w^2 cov, c = S^2^2 - w^2
    var(S^2) of the means. a < 0 means that the interval of G^2 contains 0: no upper limit, and the formula of the lower
    one stays the same. Unknown (NaN) before the second reading.
    """
    pairs = np.asarray(pairs_K2, dtype=float)
    k = len(pairs)
    if k < 2:
        return float("nan"), float("nan")
    trace, squared = mean = pairs.sum(0) / k
    away_K2 = pairs - mean
    error = WIDTH**2 * (away_K2.T @ away_K2) / (k - 1) / k
    a, b, c = squared**2 - error[1, 1], trace * squared - error[0, 1], trace**2 - error[0, 0]
    root = math.sqrt(max(b * b - a * c, 0.0))
    if squared <= 0 < a:
        return float("inf"), float("inf")
    lower = max(c, 0.0) / (b + root) if b + root > 0 else 0.0
    return float(lower), float((b + root) / a) if a > 0 else float("inf")
