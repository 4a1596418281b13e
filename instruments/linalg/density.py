"""The spectral density of a symmetric operator by stochastic Lanczos quadrature, with an error band.

The density phi(t) = 1/D sum_i delta(t - lambda_i) is the mean over random unit vectors x of sum_i (u_i'x)^2 delta(t -
lambda_i). From one x, m Lanczos steps give a tridiagonal T whose eigenvalues theta_k and squared first components w_k
of the eigenvectors are the m-point Gauss quadrature of that measure: exact for polynomials up to degree 2 m - 1. The
nodes are the answer; for drawing, each is broadened to a Gaussian. (Golub and Meurant 2010, "Matrices, moments and
quadrature with applications"; Ghorbani, Krishnan and Xiao 2019, "An investigation into neural net optimization via
Hessian eigenvalue density"; Lin, Saad and Yang 2016, "Approximating spectral densities of large matrices".)

Vectors are uniform on the sphere, so that the band does not depend on the axes of the parameters. Every step is
orthogonalised twice against all steps before: without it float32 finds the largest eigenvalue again and again.

Shapes: D = size of the operator, P = probes, m = steps (nodes of one probe), G = grid points.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from instruments.linalg.lanczos import krylov_spaces
from instruments.operators.operator import Operator
from instruments.refusal import Refusal

Array = npt.NDArray[np.float64]
MARGIN = 4.0  # grid beyond the outermost nodes, in widths
PER_WIDTH = 3  # grid points to a width
MOST_WIDTHS = 10_000


@dataclass(frozen=True)
class Quadrature:
    """One probe's nodes in ascending order and their weights, which add up to 1, shape (m,) each."""

    nodes: Array
    weights: Array


@dataclass(frozen=True)
class Count:
    """How many eigenvalues lie above an edge.

    `at_least` is certain but for rounding: Ritz values interlace with eigenvalues, so no probe has more of them above
    the edge. It is the number itself where these eigenvalues are simple and stand apart. `estimate` is D times the mean
    weight above the edge, with its standard error over probes: it sees multiplicity, and is noisy for a few.
    """

    at_least: int
    estimate: float
    stderr: float


@dataclass(frozen=True)
class Density:
    """`density_G` on `grid_G` integrates to 1; `band_G` is its standard error over probes, point by point. Both are
    smoothed by a Gaussian of standard deviation `width`, in the unit of the eigenvalues. `size` is D.
    """

    grid_G: Array
    density_G: Array
    band_G: Array
    width: float
    quadratures: tuple[Quadrature, ...]
    size: int
    products: int

    def cumulative(self, at: Array) -> tuple[Array, Array]:
        """Share of eigenvalues at or below each point, without smoothing, and its standard error over probes."""
        below = [np.searchsorted(q.nodes, at, side="right") for q in self.quadratures]
        sums = [np.concatenate([[0.0], np.cumsum(q.weights)]) for q in self.quadratures]
        return _mean_and_error([total[index] for total, index in zip(sums, below, strict=True)])

    def trace(self) -> tuple[float, float]:
        """Sum of all eigenvalues, D sum w theta, and its standard error over probes. Unbiased."""
        mean, stderr = _mean_and_error([np.array(q.weights @ q.nodes) for q in self.quadratures])
        return self.size * float(mean), self.size * float(stderr)

    def frobenius(self) -> tuple[float, float]:
        """Root of the sum of squared eigenvalues and its standard error, to first order: its square is unbiased."""
        mean, stderr = _mean_and_error([np.array(q.weights @ q.nodes**2) for q in self.quadratures])
        norm = math.sqrt(self.size * float(mean))
        return norm, self.size * float(stderr) / (2 * norm) if norm > 0 else 0.0

    def negative_share(self) -> tuple[float, float]:
        """How much of the sum of |eigenvalue| is that of negative ones, and its jackknife error over probes.

        Unlike the number of negative eigenvalues it does not hang on the sign of those that are zero but for rounding.
        """
        each_P2 = np.array(
            [[-(q.weights @ np.minimum(q.nodes, 0)), q.weights @ np.abs(q.nodes)] for q in self.quadratures]
        )
        total_2, count = each_P2.sum(0), len(each_P2)
        if total_2[1] == 0:
            return 0.0, 0.0
        left_out = total_2 - each_P2
        ratios = left_out[:, 0] / np.where(left_out[:, 1] > 0, left_out[:, 1], 1.0)
        variance = (count - 1) / count * np.square(ratios - ratios.mean()).sum()
        return float(total_2[0] / total_2[1]), math.sqrt(variance)

    def count_above(self, edge: float) -> Count:
        """Eigenvalues larger than `edge`."""
        share, stderr = _mean_and_error([np.array(q.weights[q.nodes > edge].sum()) for q in self.quadratures])
        at_least = max(int((q.nodes > edge).sum()) for q in self.quadratures)
        return Count(at_least, self.size * float(share), self.size * float(stderr))

    @property
    def bulk_edge(self) -> float:
        """Where the bulk ends: from the peak upwards, the first point where the smoothed density is less than half of
        what a single eigenvalue contributes at its own place, 1 / (D width sqrt(2 pi)). Eigenvalues nearer to the bulk
        than a few widths belong to it by this rule."""
        single = 1 / (self.size * self.width * math.sqrt(2 * math.pi))
        peak = int(self.density_G.argmax())
        empty = np.flatnonzero(self.density_G[peak:] < single / 2)
        return float(self.grid_G[peak + empty[0]]) if len(empty) else float(self.grid_G[-1])


def spectral_density(operator: Operator, *, probes: int, steps: int, seed: int, width: float | None = None) -> Density:
    """Density from `probes` runs of `steps` Lanczos steps each, at most D; an invariant subspace ends a run earlier.

    The band judges itself: with 10 probes of 60 steps the integrated difference between `cumulative` and the exact
    distribution was within three times the integrated band in 99 % of the draws, on six spectra of 240 eigenvalues.

    Unless given, `width` is (largest node - smallest node) / nodes of a probe, the mean distance of nodes, which is
    what so many steps resolve in the middle of the spectrum; with outliers far from the bulk, give a smaller one to see
    the shape of the bulk. Needs memory for `steps` vectors. Raises Refusal where a product is not finite.
    """
    if probes < 2:
        raise ValueError(f"expected at least 2 probes, got {probes}; one alone has no error band.")
    if steps < 1:
        raise ValueError(f"expected at least 1 step, got {steps}.")
    generator = torch.Generator().manual_seed(seed)
    runs = []
    for _ in range(probes):
        x_D = torch.randn(operator.size, generator=generator, dtype=operator.dtype).to(operator.device)
        runs.append(_lanczos(operator, x_D, steps))
    quadratures = tuple(_quadrature(alphas, betas) for alphas, betas in runs)
    products = sum(len(alphas) for alphas, _ in runs)
    low, high = min(q.nodes[0] for q in quadratures), max(q.nodes[-1] for q in quadratures)
    if width is None:
        width = float(high - low) / max(len(q.nodes) for q in quadratures)
        # Rounding is all that spreads the nodes of a multiple of the identity: any width shows the one eigenvalue.
        width = max(width, max(abs(float(high)), abs(float(low)), 1e-30) * 1e-3)
    grid_G = _grid(float(low), float(high), width)
    density_G, band_G = _mean_and_error([_broadened(q, grid_G, width) for q in quadratures])
    return Density(grid_G, density_G, band_G, width, quadratures, operator.size, products)


def exact_density(eigenvalues_D: Array, width: float) -> Density:
    """The density of a spectrum that is known, smoothed as an estimate would be; its band is zero."""
    nodes = np.sort(eigenvalues_D)
    exact = Quadrature(nodes, np.full(len(nodes), 1 / len(nodes)))
    grid_G = _grid(float(nodes[0]), float(nodes[-1]), width)
    density_G = _broadened(exact, grid_G, width)
    return Density(grid_G, density_G, np.zeros_like(density_G), width, (exact,), len(nodes), 0)


def _grid(low: float, high: float, width: float) -> Array:
    if not width * MOST_WIDTHS >= high - low:
        raise ValueError(
            f"expected a width of at least {(high - low) / MOST_WIDTHS:.1e}, one in {MOST_WIDTHS:,} of the spectrum, "
            f"got {width:.1e}; what lies between is noise of the probes, and the grid would not fit."
        )
    points = PER_WIDTH * math.ceil((high - low) / width + 2 * MARGIN) + 1
    return np.linspace(low - MARGIN * width, high + MARGIN * width, points)


def _lanczos(operator: Operator, start_D: Tensor, steps: int) -> tuple[list[float], list[float]]:
    """Diagonal and off-diagonal of T, full reorthogonalisation twice; shorter where the Krylov space is exhausted."""
    for krylov in krylov_spaces(operator, start_D, min(steps, operator.size)):
        if not krylov.finite:
            raise Refusal("a product of the operator is not finite, so it has no spectrum.")
        if krylov.exhausted(max(map(abs, [*krylov.alphas, *krylov.betas]))):
            break
    return krylov.alphas, krylov.betas[: len(krylov.alphas) - 1]


def _quadrature(alphas: Sequence[float], betas: Sequence[float]) -> Quadrature:
    nodes_m, vectors_mm = eigh_tridiagonal(np.array(alphas), np.array(betas))
    return Quadrature(nodes_m, vectors_mm[0] ** 2)


def _broadened(quadrature: Quadrature, grid_G: Array, width: float) -> Array:
    z_Gm = (grid_G[:, None] - quadrature.nodes) / width
    density_G: Array = np.exp(-(z_Gm**2) / 2) @ quadrature.weights / (width * math.sqrt(2 * math.pi))
    return density_G


def _mean_and_error(each: Sequence[Array]) -> tuple[Array, Array]:
    """Mean over probes and its standard error."""
    values_P = np.stack(each)
    return values_P.mean(0), values_P.std(0, ddof=1) / math.sqrt(len(values_P))
