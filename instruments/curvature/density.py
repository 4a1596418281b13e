"""How the eigenvalues of the curvature are spread: bulk, outliers, negative ones.

Shapes: D = trainable scalars, K = points of the grid.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from instruments.curvature._matrix import Matrix, at_least, need_only, operator_of, price_of
from instruments.instrument import Estimate, Gauge, Output, Values
from instruments.linalg.density import spectral_density
from instruments.view import Need, View


@dataclass(frozen=True)
class SpectralDensity(Gauge):
    """phi(t) = 1/D sum_i delta(t - lambda_i) on the held batches, by stochastic Lanczos quadrature.

    `probes` random vectors, `steps` Lanczos steps from each (at most D), with full reorthogonalisation; nodes and
    weights of the Gauss quadratures are smoothed by a Gaussian whose width is their mean distance. The cost is probes
    times steps products: by far the dearest reading here, for a few moments of a run. Memory: `steps` vectors of
    length D.

    `bulk_edge` is where the smoothed density, followed upwards from its peak, first falls below half of what a single
    eigenvalue would give. `outliers` counts what lies above: `outliers` is D times the weight, noisy for a few of them;
    `outliers_seen` is how many one probe has resolved, never too many, and too few where they are multiple or close.
    `trace` and `frobenius` come from the same nodes, exact moments of the same random vectors (the error of the norm
    to first order). `negative` is the share of negative eigenvalues in the sum of |eigenvalue|: their number is not
    asked for, since many eigenvalues are zero but for rounding. The standard errors are over probes, and rest on few
    of them: with 6 probes two of them cover 90 %, three 97 %.

    The resolution is the smoothing width, about (largest - smallest) / steps: with outliers far away the bulk is one
    peak, and its inner shape is not seen. Raises Refusal where a product is not finite.
    """

    matrix: Matrix = "hessian"
    probes: int = 6
    steps: int = 30

    outputs: ClassVar[Mapping[str, Output]] = {
        "density": Output("loss / parameter²", "density of eigenvalues, integrates to 1", "spectrum"),
        "band": Output("loss / parameter²", "standard error of the density over probes, on the same grid", "spectrum"),
        "bulk_edge": Output("loss / parameter²", "where the bulk ends; what lies above are outliers"),
        "outliers": Output("1", "eigenvalues above the bulk, by their weight"),
        "outliers_seen": Output("1", "eigenvalues above the bulk that one probe has resolved: at least so many"),
        "negative": Output("1", "share of the negative eigenvalues in the sum of |eigenvalue|"),
        "trace": Output("loss / parameter²", "sum of all eigenvalues", edge=0.0),
        "frobenius": Output("loss / parameter²", "root of the sum of all squared eigenvalues"),
        "largest": Output("loss / parameter²", "largest node: the largest eigenvalue is no smaller"),
        "smallest": Output("loss / parameter²", "smallest node: the smallest eigenvalue is no larger", edge=0.0),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"hessian"})
    reference: ClassVar[str] = (
        "Ghorbani, Krishnan and Xiao 2019, An investigation into neural net optimization via Hessian eigenvalue "
        "density, section 2; Golub and Meurant 2010, Matrices, moments and quadrature with applications"
    )

    def __post_init__(self) -> None:
        need_only(self, self.matrix)
        at_least("probes", self.probes, 2)
        at_least("steps", self.steps, 1)

    def price(self, view: View) -> float:
        return price_of(self.matrix, self.probes * min(self.steps, view.layout.size))

    def read(self, view: View) -> Values:
        found = spectral_density(operator_of(view, self.matrix), probes=self.probes, steps=self.steps, seed=view.step)
        edge = found.bulk_edge
        count = found.count_above(edge)
        return {
            "density": np.stack([found.grid_G, found.density_G]),
            "band": np.stack([found.grid_G, found.band_G]),
            "bulk_edge": edge,
            "outliers": Estimate(count.estimate, count.stderr),
            "outliers_seen": float(count.at_least),
            "negative": Estimate(*found.negative_share()),
            "trace": Estimate(*found.trace()),
            "frobenius": Estimate(*found.frobenius()),
            "largest": float(max(q.nodes[-1] for q in found.quadratures)),
            "smallest": float(min(q.nodes[0] for q in found.quadratures)),
        }
