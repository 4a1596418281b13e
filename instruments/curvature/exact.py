"""The whole spectrum of a small model's curvature, without estimates: the oracle for all the others.

Shapes: D = trainable scalars, K = points of the grid.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from instruments.curvature._matrix import Matrix, at_least, need_only, operator_of, price_of
from instruments.instrument import Gauge, Output, Values
from instruments.linalg.dense import LIMIT, dense
from instruments.linalg.density import exact_density
from instruments.refusal import Refusal
from instruments.view import Need, View

POINTS = 100  # widths of the smoothing in the range of the eigenvalues


@dataclass(frozen=True)
class ExactSpectrum(Gauge):
    """All D eigenvalues of the Hessian (or Gauss-Newton matrix) on the held batches, by D products and a dense solve.

    Refuses above `limit` parameters, 3,000 unless told otherwise: 3,000 products, 72 MB and some ten seconds. Products
    are in the precision of the model; the matrix is made symmetric and solved in float64. `rounding` is how far an
    eigenvalue may be off, from the asymmetry of the products: |A - A'| in the Frobenius norm, plus ten units in the
    last place of the largest. Smaller eigenvalues count as zero: neither negative nor in the condition number.

    `effective_dimension` = sum lambda / (lambda + z) over positive eigenvalues, z = `damping` times the largest: how
    many directions the data determine against a prior of that curvature. `density` is smoothed by a hundredth of the
    range, for the eye, on the same axes as `curvature/density`; all other values are of the eigenvalues themselves.
    Raises Refusal where a product is not finite.
    """

    matrix: Matrix = "hessian"
    limit: int = LIMIT
    damping: float = 0.01

    outputs: ClassVar[Mapping[str, Output]] = {
        "density": Output("loss / parameter²", "density of the eigenvalues, smoothed for the eye", "spectrum"),
        "largest": Output("loss / parameter²", "largest eigenvalue: the sharpness"),
        "smallest": Output("loss / parameter²", "smallest eigenvalue", edge=0.0),
        "trace": Output("loss / parameter²", "sum of all eigenvalues", edge=0.0),
        "frobenius": Output("loss / parameter²", "root of the sum of all squared eigenvalues"),
        "negative": Output("1", "number of eigenvalues below zero by more than rounding"),
        "zero": Output("1", "number of eigenvalues that are zero but for rounding"),
        "condition": Output("1", "largest over smallest |eigenvalue| that is not zero; NaN where all are"),
        "effective_dimension": Output("1", "sum of lambda / (lambda + z), the directions that the data determine"),
        "rounding": Output("loss / parameter²", "how far an eigenvalue may be off"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"hessian"})
    reference: ClassVar[str] = (
        "effective dimension: MacKay 1992, Bayesian interpolation, section 4; Maddox, Benton and Wilson 2020, "
        "Rethinking parameter counting in deep models"
    )

    def __post_init__(self) -> None:
        need_only(self, self.matrix)
        at_least("limit", self.limit, 1)
        if not self.damping > 0:
            raise ValueError(f"expected damping above 0, got {self.damping}.")

    def price(self, view: View) -> float:
        return price_of(self.matrix, view.layout.size) if view.layout.size <= self.limit else 1.0

    def read(self, view: View) -> Values:
        if view.layout.size > self.limit:
            raise Refusal(
                f"expected at most {self.limit:,} parameters for the whole spectrum, got {view.layout.size:,}; read "
                "curvature/density, which estimates it, or restrict the parameters of the cockpit."
            )
        operator = operator_of(view, self.matrix)
        matrix = dense(operator, limit=self.limit)
        values_D: npt.NDArray[np.float64] = matrix.eigenvalues().numpy()
        biggest, norm = float(np.abs(values_D).max()), float(np.linalg.norm(values_D))
        rounding = matrix.asymmetry * norm + 10 * torch.finfo(operator.dtype).eps * biggest
        known = np.abs(values_D[np.abs(values_D) > rounding])
        width = max(float(values_D[-1] - values_D[0]) / POINTS, 1e-3 * biggest, 1e-30)
        density = exact_density(values_D, width)
        return {
            "density": np.stack([density.grid_G, density.density_G]),
            "largest": float(values_D[-1]),
            "smallest": float(values_D[0]),
            "trace": float(values_D.sum()),
            "frobenius": norm,
            "negative": float((values_D < -rounding).sum()),
            "zero": float(len(values_D) - len(known)),
            "condition": float(known.max() / known.min()) if len(known) else float("nan"),
            "effective_dimension": effective_dimension(values_D, self.damping),
            "rounding": rounding,
        }


def effective_dimension(values_D: npt.NDArray[np.float64], damping: float) -> float:
    """sum lambda / (lambda + damping lambda_max) over positive eigenvalues; 0 where none is."""
    positive = values_D[values_D > 0]
    return float((positive / (positive + damping * positive.max())).sum()) if len(positive) else 0.0
