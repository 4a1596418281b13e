"""m-coherence: how many examples of the batch a step along its gradient helps.

Shapes: N = examples of the step, L = trained parameter tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from instruments.gradient._estimates import jackknife, require_examples
from instruments.instrument import Estimate, Gauge, Output, Values
from instruments.view import Need, View


@dataclass(frozen=True)
class Coherence(Gauge):
    """Agreement of the gradients of single examples.

    With A = sum |g_i|^2 and Q = |sum g_i|^2 over the N examples of the batch,

        coherence = alpha_m = Q / A,      pairwise = (Q - A) / ((N - 1) A).

    alpha_m lies between 0 and N: 1 for gradients orthogonal to one another, N for identical ones, 0 where they cancel.
    It is a number of examples, and grows with the batch; `pairwise`, the mean product of two different examples over
    the mean square of one, does not: numerator and denominator are unbiased for |G|^2 and E |g|^2. Exactly,
    alpha_m = N / (1 + (N - 1) theta^2) with theta^2 of the norm test.

    High coherence at initialisation says little: one output bias that all examples share gives it whatever the labels,
    so leave the first twenty steps out. Compare at equal training loss and layer by layer. On ImageNet real labels were
    seen far above random ones; on small problems the two overlap, and random labels may rise as well. Standard errors
    are the jackknife over the examples. A gradient that is exactly zero for all examples: NaN.
    """

    outputs: ClassVar[Mapping[str, Output]] = {
        "coherence": Output("examples", "alpha_m = Q / A: 1 for orthogonal gradients, N for identical ones", edge=1.0),
        "pairwise": Output("1", "mean product of two examples over mean square of one, whatever the batch", edge=0.0),
        "per_layer": Output("examples", "alpha_m of each parameter tensor", "per-layer"),
        "pairwise_per_layer": Output("1", "the pairwise form of each parameter tensor", "per-layer"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"samples", "inner_products"})
    reference: ClassVar[str] = (
        "Chatterjee and Zielinski 2020, Making coherence out of nothing at all: measuring the evolution of gradient "
        "alignment"
    )

    def price(self, view: View) -> float:
        return view.sample_pass + 2 / 3

    def read(self, view: View) -> Values:
        moments = view.moments
        n = require_examples(moments, 2)
        a_L, q_L = moments.sum_of_squares_L, moments.square_of_sum_L
        a, q = a_L.sum(), q_L.sum()
        a_N, q_N = moments.left_out_totals
        with np.errstate(divide="ignore", invalid="ignore"):
            return {
                "coherence": Estimate(float(q / a), jackknife(q_N / a_N)),
                "pairwise": Estimate(float(pairwise(a, q, n)), jackknife(pairwise(a_N, q_N, n - 1))),
                "per_layer": q_L / a_L,
                "pairwise_per_layer": pairwise(a_L, q_L, n),
            }


def pairwise(a: Any, q: Any, n: int) -> Any:
    """(Q - A) / ((n - 1) A); with one example 0/0, NaN."""
    return (q - a) / ((n - 1) * a)
