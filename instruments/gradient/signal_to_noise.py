"""Signal-to-noise ratio of the gradient, coordinate by coordinate.

Shapes: N = examples of the step, D = trainable scalars, L = trained parameter tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from instruments.instrument import Estimate, Gauge, Output, Values
from instruments.refusal import Refusal
from instruments.samples.moments import SampleMoments
from instruments.samples.problem import flat_pieces
from instruments.view import Need, View


@dataclass(frozen=True)
class SignalToNoise(Gauge):
    """How much of the gradient is signal: (E g)^2 / Var(g), with the share of the noise in the mean taken out.

    With the mean gbar_j and the unbiased variance s_j^2 of coordinate j over the N examples of the batch,

        r_j = (gbar_j^2 - s_j^2 / N) / s_j^2,

    whose numerator is unbiased for (E g_j)^2; without the correction r_j has the floor 1/N (and its mean 1/(N - 3))
    where there is no signal at all. Under pure noise r_j is negative for two coordinates in three, and so is the
    median, by about -0.55/N. `aggregate` is the ratio of the sums over coordinates, |G|^2 / tr(Sigma), the inverse of
    the noise scale; its standard error is the jackknife over the examples. Coordinates without variance (a unit that is
    dead for the whole batch) are left out and counted. No constant is added to the denominator.
    """

    outputs: ClassVar[Mapping[str, Output]] = {
        "aggregate": Output("1", "sum of signal over sum of noise: (|g|^2 - S^2/N) / S^2; may be negative"),
        "median": Output("1", "median over the coordinates of the de-biased ratio; may be negative"),
        "per_layer": Output("1", "the aggregate of each parameter tensor", "per-layer"),
        "silent": Output("1", "share of coordinates without variance in this batch", edge=1.0),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"samples", "second_moment", "inner_products"})
    reference: ClassVar[str] = (
        "Liu et al. 2020, Understanding why neural networks generalize well through GSNR of parameters, eq. 1; "
        "here without the bias of the plug-in estimate"
    )

    def price(self, view: View) -> float:
        return 2.0

    def read(self, view: View) -> Values:
        moments = view.moments
        n = moments.examples
        if n < 2:
            raise Refusal(f"a variance needs at least two examples a step, got {n}.")
        assert moments.second_D is not None
        signal_D = moments.mean_D.double().square()
        variance_D = (moments.second_D.double() - signal_D).clamp(min=0) * (n / (n - 1))
        signal_D -= variance_D / n
        heard_D = variance_D > 8 * torch.finfo(moments.mean_D.dtype).eps * moments.second_D
        pieces = zip(*(flat_pieces(moments.layout, v_D) for v_D in (signal_D, variance_D)), strict=True)
        sums_L2 = torch.stack([torch.stack([signal.sum(), noise.sum()]) for signal, noise in pieces])
        signal, noise = sums_L2.sum(0)
        ratios = signal_D[heard_D] / variance_D[heard_D]
        return {
            "aggregate": Estimate(signal / noise, jackknife(moments)),
            "median": ratios.median() if len(ratios) else float("nan"),
            "per_layer": sums_L2[:, 0] / sums_L2[:, 1],
            "silent": 1 - heard_D.double().mean(),
        }


def jackknife(moments: SampleMoments) -> Tensor:
    """Standard error of |G|^2 / tr(Sigma) over the examples: each is left out once, at no further cost.

    Without example i the sums A = sum |g|^2 and Q = |sum g|^2 are A - a_i and Q - 2 N <g_i, mean> + a_i.
    """
    assert moments.inner_NL is not None
    n, a_N = moments.examples, moments.norms_sq_N.double()
    if n < 3:
        return torch.tensor(float("nan"))
    total, square = a_N.sum(), moments.square_of_sum_L.sum()
    left_A_N = total - a_N
    left_Q_N = square - 2 * n * moments.inner_NL.double().sum(1) + a_N
    m = n - 1
    ratio_N = ((left_Q_N - left_A_N) / (m * (m - 1))) / ((left_A_N - left_Q_N / m) / (m - 1))
    return ((n - 1) / n * (ratio_N - ratio_N.mean()).square().sum()).sqrt()
