"""The few largest eigenvalues, the gap below them, and how much of the gradient lies among them.

Shapes: D = trainable scalars, k = eigenvalues that are shown.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from instruments.curvature._matrix import at_least, price_of
from instruments.curvature._top import Array, start_from, top_eigenpairs
from instruments.instrument import Instrument, Output, State, Values
from instruments.view import Need, View

MOST = 10
EIGENVALUES = {
    f"eigenvalue_{i}": Output("loss / parameter²", f"number {i} of the eigenvalues, the largest first; NaN beyond k")
    for i in range(1, MOST + 1)
}


@dataclass(frozen=True)
class Outliers(Instrument):
    """The `k` largest eigenvalues of the Hessian on the held batches (at most 10), and the one after them.

    A classifier of C classes has about C, or C - 1, that stand off from the bulk. Lanczos from the sum of the last Ritz
    vectors, the gradient and a random vector, until the residuals |H v - lambda v| of all k + 1 are at most `tol` times
    the largest, or `max_products` are spent: then `converged` is 0, and the lower of the values are too low. Values are
    never above the eigenvalue of their rank. Of eigenvalues closer than the tolerance, or equal, one may be missed;
    then those after it move up. Where there are fewer different ones than asked for, the rest is NaN. Memory:
    `max_products` vectors of length D during the reading, one between readings.

    `outlier_ratio` is lambda_1 / lambda_(k+1); large for networks without batch normalisation, with k the number of
    classes. `outliers` is the place of the largest ratio of neighbours, lambda_i / lambda_(i+1), i <= k, and
    `largest_gap` that ratio: the outliers against the bulk, if k reaches it; a ratio of 1.2 is no gap. Both look at
    positive eigenvalues only and are NaN where there are not two.

    `concentration` = |V'g|^2 / |g|^2, V the k eigenvectors: the share of the squared gradient among them. A random
    direction would have k/D. High concentration is oscillation across the sharp directions rather than progress in
    them: training goes on as well with these directions taken out of the step (Song, Ahn and Yun 2025).
    """

    k: int = 5
    tol: float = 0.02
    max_products: int = 40

    outputs: ClassVar[Mapping[str, Output]] = EIGENVALUES | {
        "next": Output("loss / parameter²", "the eigenvalue after the k largest; NaN where the model has none"),
        "residual": Output("loss / parameter²", "largest residual |H v - lambda v| among them"),
        "outliers": Output("1", "how many eigenvalues stand above the largest gap; NaN without two positive ones"),
        "largest_gap": Output("1", "ratio of the eigenvalues to both sides of that gap; NaN likewise"),
        "outlier_ratio": Output("1", "lambda_1 / lambda_(k+1); NaN where the latter is not positive"),
        "concentration": Output("1", "share of the squared gradient along the k eigenvectors; NaN for a zero gradient"),
        "converged": Output("1", "1 when all residuals met the tolerance, 0 when products ran out"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"hessian"})
    reference: ClassVar[str] = (
        "Ghorbani, Krishnan and Xiao 2019, An investigation into neural net optimization via Hessian eigenvalue "
        "density, sections 3 and 4; Gur-Ari, Roberts and Dyer 2018, Gradient descent happens in a tiny subspace; "
        "Song, Ahn and Yun 2025, Does SGD really happen in tiny subspaces?"
    )

    def __post_init__(self) -> None:
        if not 1 <= self.k <= MOST:
            raise ValueError(f"expected k from 1 to {MOST}, got {self.k}; curvature/density counts more outliers.")
        at_least("max_products", self.max_products, self.k + 1)

    def price(self, view: View) -> float:
        return price_of("hessian", min(self.max_products, view.layout.size, 3 * (self.k + 1)))

    def init(self) -> State:
        return {"kept_D": None}

    def advance(self, view: View, state: State) -> tuple[Values, State]:
        operator, gradient_D = view.hessian, view.gradient_D
        start_D = start_from(operator, state["kept_D"], gradient_D, view.step)
        top = top_eigenpairs(operator, start_D, k=self.k + 1, tol=self.tol, max_products=self.max_products)
        outliers, gap = largest_gap(top.values)
        first, after = float(top.values[0]), float(top.values[-1])
        shown = np.concatenate([top.values[: self.k], np.full(MOST - self.k, np.nan)])
        values: Values = {
            **dict(zip(EIGENVALUES, map(float, shown), strict=True)),
            "next": after,
            "residual": float(np.fmax.reduce(top.residuals)),
            "outliers": outliers,
            "largest_gap": gap,
            "outlier_ratio": first / after if after > 0 else float("nan"),
            "concentration": concentration(top.vectors_kD[: self.k], gradient_D),
            "converged": float(top.converged),
        }
        return values, {"kept_D": top.kept()}


def largest_gap(values: Array) -> tuple[float, float]:
    """(number above the gap, ratio across it) among the positive values, in descending order."""
    positive = values[values > 0]
    if len(positive) < 2:
        return float("nan"), float("nan")
    ratios = positive[:-1] / positive[1:]
    place = int(ratios.argmax())
    return float(place + 1), float(ratios[place])


def concentration(vectors_kD: Tensor, gradient_D: Tensor) -> Tensor:
    """|V'g|^2 / |g|^2; NaN for a zero gradient, and where there are no vectors."""
    if not len(vectors_kD):
        return torch.tensor(torch.nan)
    along_k = vectors_kD @ (gradient_D / gradient_D.norm())
    return torch.dot(along_k, along_k)
