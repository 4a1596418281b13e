"""Spectral densities against exact spectra, judged by their own error band.

Shapes: D = size of the matrix, m = Lanczos steps, G = grid points.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from instruments.linalg.density import Density, spectral_density
from instruments.operators.operator import DenseOperator
from instruments.refusal import Refusal

D = 240
UNIFORM = torch.linspace(-1, 1, D).tolist()
SEMICIRCLE = torch.linalg.eigvalsh(
    (lambda a: (a + a.T) / (8 * D) ** 0.5)(torch.randn(D, D, generator=torch.Generator().manual_seed(0)).double())
).tolist()
SPECTRA = {
    "uniform": UNIFORM,
    "semicircle": SEMICIRCLE,
    "outliers": [*SEMICIRCLE[: D - 4], 3.0, 4.0, 6.0, 9.0],
    "two_bulks": [*torch.linspace(0, 0.2, 180).tolist(), *torch.linspace(1, 1.3, 60).tolist()],
    "power": [1 / i for i in range(1, D + 1)],
    "low_rank": [0.0] * (D - 6) + [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
}


def rotated(eigenvalues: list[float], seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))
    return q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T


def operator(name: str) -> DenseOperator:
    return DenseOperator(rotated(SPECTRA[name]))


def distance(measured: Density, eigenvalues: list[float]) -> tuple[float, float]:
    """Integrated difference of the cumulative distributions, and the integral of the band of the measured one."""
    exact = np.sort(eigenvalues)
    low, high = exact[0], exact[-1]
    at = np.linspace(low - 0.01 * (high - low), high + 0.01 * (high - low), 20_001)
    share, band = measured.cumulative(at)
    truth = np.searchsorted(exact, at, side="right") / len(exact)
    spacing = at[1] - at[0]
    return float(np.abs(share - truth).sum() * spacing), float(band.sum() * spacing)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SPECTRA)
def test_cumulative_distribution_is_exact_within_its_band(name: str, seed: int) -> None:
    measured = spectral_density(operator(name), probes=10, steps=60, seed=seed)
    difference, band = distance(measured, SPECTRA[name])
    assert difference < 3 * band
    assert band < 0.05 * (max(SPECTRA[name]) - min(SPECTRA[name]))


def test_density_is_the_smoothed_spectrum_within_its_band() -> None:
    eigenvalues = np.array(SEMICIRCLE)
    measured = spectral_density(operator("semicircle"), probes=20, steps=60, seed=0, width=0.05)
    z = (measured.grid_G[:, None] - eigenvalues) / 0.05
    exact = np.exp(-(z**2) / 2).mean(1) / (0.05 * (2 * np.pi) ** 0.5)
    off = np.abs(measured.density_G - exact) / (3 * measured.band_G + 0.01 * exact.max())
    assert np.mean(off <= 1) > 0.95
    assert np.median(measured.band_G) < 0.06 * exact.max()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 12))
def test_each_probe_is_a_gauss_quadrature(seed: int, size: int, steps: int) -> None:
    """Twin: x'A^k x by repeated products, for every degree up to 2 m - 1."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(size, size, generator=g, dtype=torch.float64) / size**0.5
    a = a + a.T
    measured = spectral_density(DenseOperator(a), probes=2, steps=steps, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for quadrature in measured.quadratures:
        x = torch.randn(size, generator=generator, dtype=torch.float64)
        x, moment = x / x.norm(), x / x.norm()
        assert quadrature.weights.sum() == pytest.approx(1.0)
        for degree in range(2 * len(quadrature.nodes)):
            scale = float(np.abs(quadrature.nodes).max()) ** degree
            expected = float(x @ moment)
            assert (quadrature.weights * quadrature.nodes**degree).sum() == pytest.approx(expected, abs=1e-8 * scale)
            moment = a @ moment
    assert measured.products == 2 * min(steps, size)


@pytest.mark.parametrize("name", SPECTRA)
def test_density_integrates_to_one(name: str) -> None:
    measured = spectral_density(operator(name), probes=4, steps=30, seed=0)
    spacing = measured.grid_G[1] - measured.grid_G[0]
    assert measured.density_G.sum() * spacing == pytest.approx(1.0, abs=1e-3)
    spread = max(q.nodes[-1] for q in measured.quadratures) - min(q.nodes[0] for q in measured.quadratures)
    assert measured.width == pytest.approx(spread / max(len(q.nodes) for q in measured.quadratures))


@pytest.mark.parametrize("seed", range(5))
def test_outliers_are_counted_and_none_twice(seed: int) -> None:
    measured = spectral_density(operator("outliers"), probes=8, steps=80, seed=seed)
    assert max(SEMICIRCLE) < measured.bulk_edge < 3.0
    count = measured.count_above(measured.bulk_edge)
    assert count.at_least == 4
    assert abs(count.estimate - 4) < 4 * count.stderr
    assert measured.count_above(100.0).at_least == 0
    everything = measured.count_above(-100.0)
    assert everything.estimate == pytest.approx(D)


def test_multiplicity_is_seen_by_the_estimate_alone() -> None:
    eigenvalues = [0.0] * 180 + [1.0] * 60
    measured = spectral_density(DenseOperator(rotated(eigenvalues)), probes=20, steps=30, seed=0)
    count = measured.count_above(0.5)
    assert count.at_least < 10
    assert abs(count.estimate - 60) < 4 * count.stderr
    assert 0 < count.stderr < 10


def test_single_precision_finds_no_ghosts() -> None:
    """Without reorthogonalisation the largest eigenvalue would appear several times."""
    measured = spectral_density(DenseOperator(rotated(SPECTRA["outliers"]).float()), probes=3, steps=120, seed=0)
    for quadrature in measured.quadratures:
        assert (quadrature.nodes > 2.0).sum() == 4
        assert quadrature.nodes[-4:] == pytest.approx([3.0, 4.0, 6.0, 9.0], abs=1e-4)


def test_band_shrinks_with_probes() -> None:
    few, many = (spectral_density(operator("uniform"), probes=p, steps=20, seed=0, width=0.1) for p in (6, 96))
    middle = np.abs(few.grid_G) < 0.8
    ratio = few.band_G[middle].mean() / many.band_G[np.abs(many.grid_G) < 0.8].mean()
    assert 2.5 < ratio < 6.5  # 4, but for the noise of the first


def test_special_operators() -> None:
    identity = spectral_density(DenseOperator(3 * torch.eye(7, dtype=torch.float64)), probes=2, steps=5, seed=0)
    assert [len(q.nodes) for q in identity.quadratures] == [1, 1]
    assert identity.grid_G[identity.density_G.argmax()] == pytest.approx(3.0, abs=0.01)
    zero = spectral_density(DenseOperator(torch.zeros(7, 7)), probes=2, steps=5, seed=0)
    assert zero.count_above(0.0).estimate == 0
    assert np.isfinite(zero.density_G).all()
    state = torch.random.get_rng_state()
    one, same, other = (spectral_density(operator("uniform"), probes=2, steps=5, seed=s) for s in (0, 0, 1))
    assert np.array_equal(one.density_G, same.density_G)
    assert not np.array_equal(one.quadratures[0].nodes, other.quadratures[0].nodes)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_misuse() -> None:
    matrix = DenseOperator(torch.diag(torch.arange(5.0)))
    with pytest.raises(ValueError, match="at least 2 probes"):
        spectral_density(matrix, probes=1, steps=3, seed=0)
    with pytest.raises(ValueError, match="at least 1 step"):
        spectral_density(matrix, probes=2, steps=0, seed=0)
    with pytest.raises(ValueError, match=r"width of at least 4\.0e-04"):
        spectral_density(matrix, probes=2, steps=5, seed=0, width=1e-9)
    with pytest.raises(Refusal, match="not finite"):
        spectral_density(DenseOperator(torch.full((3, 3), float("inf"))), probes=2, steps=2, seed=0)
