"""Gradient noise scale and norm test, from the pair (sum of squared norms, squared norm of the sum).

Shapes: N = examples of the step, K = readings pooled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from instruments.instrument import Estimate, Instrument, Output, State, Values
from instruments.refusal import Refusal
from instruments.view import Need, View


@dataclass(frozen=True)
class NoiseScale(Instrument):
    """How noisy the mini-batch gradient is, in examples.

    With A = sum |g_i|^2 and Q = |sum g_i|^2 over the N examples of a batch, unbiased for the trace of the gradient
    covariance and for the squared norm of the full gradient are

        S^2 = (A - Q/N) / (N - 1),      G^2 = (Q - A) / (N (N - 1)),

    and B_simple = tr(Sigma) / |G|^2 is estimated by the ratio of their sums over the last `pool` readings, never by an
    average of ratios. Its standard error is the jackknife over those readings: unknown (NaN) at the first. G^2 of one
    batch may be negative; when the pooled one is, the data say no more than "large" and `noise_scale` is infinite. The
    norm test is theta^2 = S^2 / (N |g_B|^2), about x/(1 + x) for x = B_simple/N: near 1 the step is noise.
    """

    pool: int = 20

    outputs: ClassVar[Mapping[str, Output]] = {
        "noise_scale": Output("examples", "pooled tr(Sigma) / |G|^2: batches far below it are mostly noise"),
        "norm_test": Output("1", "theta^2 = S^2 / (N |g_B|^2) of this batch; 1 means all noise", edge=1.0),
        "sum_of_squared_norms": Output("(loss / parameter)²", "A = sum over examples of |g_i|^2"),
        "squared_norm_of_sum": Output("(loss / parameter)²", "Q = |sum over examples of g_i|^2"),
        "trace_of_covariance": Output("(loss / parameter)²", "S^2, unbiased for tr(Sigma), of this batch"),
        "squared_gradient": Output("(loss / parameter)²", "G^2, unbiased for |G|^2, of this batch; may be negative"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"samples"})
    reference: ClassVar[str] = (
        "McCandlish et al. 2018, An empirical model of large-batch training, appendix A.1; "
        "norm test: Byrd et al. 2012, Sample size selection in optimization methods, eq. 3.6"
    )

    def price(self, view: View) -> float:
        return 2.0

    def init(self) -> State:
        return {"pairs": []}

    def advance(self, view: View, state: State) -> tuple[Values, State]:
        moments = view.moments
        n = moments.examples
        if n < 2:
            raise Refusal(f"noise needs at least two examples a step, got {n}.")
        sums = torch.stack([moments.norms_sq_N.double().sum(), (n * moments.mean_D.double()).square().sum()])
        a, q = sums.tolist()
        trace, squared = (a - q / n) / (n - 1), (q - a) / (n * (n - 1))
        pairs = [*state["pairs"], (trace, squared)][-self.pool :] if np.isfinite([a, q]).all() else state["pairs"]
        values: Values = {
            "noise_scale": pooled_ratio(pairs),
            "norm_test": trace * n / q if q > 0 else float("nan"),
            "sum_of_squared_norms": a,
            "squared_norm_of_sum": q,
            "trace_of_covariance": trace,
            "squared_gradient": squared,
        }
        return values, {"pairs": pairs}


def pooled_ratio(pairs_K2: Sequence[tuple[float, float]]) -> Estimate:
    """sum S^2 / sum G^2 with its jackknife standard error over the pooled readings."""
    if not pairs_K2:
        return Estimate(float("nan"), float("nan"))
    pairs = np.array(pairs_K2, dtype=float)
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
