"""Spectral density as read, and the exact spectrum, against eigenvalues of dense matrices."""

from typing import Any

import numpy as np
import pytest
import torch
from cases import Built
from gauss_newton_twin import dense_gauss_newton
from taking import case, take
from torch import nn
from twins import dense_hessian

from instruments.curvature.density import SpectralDensity
from instruments.curvature.exact import ExactSpectrum, effective_dimension
from instruments.refusal import Refusal

DRAWS = 300
NAMES = ["mlp", "mlp_weighted", "cnn_plain", "tied_attention", "recurrent", "called_twice_unused", "frozen"]


def eigenvalues(built: Built, matrix: str = "hessian") -> Any:
    h = dense_hessian(built.model, built.loss, built.batch) if matrix == "hessian" else dense_gauss_newton(built)
    return torch.linalg.eigvalsh(h).numpy()


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("name", NAMES)
def test_exact_is_the_dense_spectrum(name: str, matrix: Any) -> None:
    built = case(name)
    truth = eigenvalues(built, matrix)
    values, _, provenance = take(ExactSpectrum(matrix=matrix), built)
    assert values["largest"] == pytest.approx(truth[-1], abs=1e-6)
    assert values["smallest"] == pytest.approx(truth[0], abs=1e-6)
    assert values["trace"] == pytest.approx(truth.sum(), abs=1e-6)
    assert values["frobenius"] == pytest.approx((truth**2).sum() ** 0.5, abs=1e-6)
    assert values["rounding"] < 1e-12 * truth[-1] + 1e-14
    sure = np.abs(truth) > 1e-6  # differences of gradients know no more
    assert values["negative"] >= (truth[sure] < 0).sum()
    assert values["negative"] + values["zero"] <= (truth < 1e-6).sum()
    assert values["effective_dimension"] == pytest.approx(effective_dimension(truth, 0.01), abs=1e-3)
    grid, density = values["density"]
    assert np.trapezoid(density, grid) == pytest.approx(1.0, abs=1e-3)
    assert provenance["route"]


def quadratic(curvatures: list[float]) -> Built:
    """loss = 1/2 sum c_i theta_i^2, whose Hessian has the eigenvalues c."""
    c = torch.tensor(curvatures, dtype=torch.float64)
    model = nn.Linear(len(c), 1, bias=False).double()
    return Built(model, lambda call, x: (c * call(x).square().T).sum(0) / 2, torch.eye(len(c), dtype=torch.float64))


def test_what_is_counted_and_what_is_not() -> None:
    """Per-example losses of a diagonal quadratic are averaged over its 6 rows: eigenvalues are c / 6."""
    c = torch.tensor([8.0, 4.0, 1.0, 0.0, 0.0, -0.5], dtype=torch.float64)
    model = nn.Linear(6, 1, bias=False).double()
    built = Built(model, lambda call, x: c * call(x)[:, 0].square() / 2 * 6, torch.eye(6, dtype=torch.float64))
    values, _, _ = take(ExactSpectrum(damping=0.5), built)
    assert (values["largest"], values["smallest"]) == (pytest.approx(8.0), pytest.approx(-0.5))
    assert (values["negative"], values["zero"]) == (1.0, 2.0)
    assert values["condition"] == pytest.approx(16.0)
    assert values["effective_dimension"] == pytest.approx(8 / 12 + 4 / 8 + 1 / 5)


def test_large_models_and_broken_ones_are_refused() -> None:
    with pytest.raises(Refusal, match="expected at most 42 parameters for the whole spectrum, got 43"):
        take(ExactSpectrum(limit=42), case("mlp"))
    broken = case("mlp")
    with torch.no_grad():
        broken.model[0].weight.fill_(torch.nan)
    for instrument in (ExactSpectrum(), SpectralDensity()):
        with pytest.raises(Refusal, match="not finite"):
            take(instrument, broken)


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("name", NAMES)
def test_density_agrees_with_the_spectrum_within_its_errors(name: str, matrix: Any) -> None:
    built = case(name)
    truth = eigenvalues(built, matrix)
    values, _, _ = take(SpectralDensity(matrix=matrix, probes=10), built)
    for output, expected in (("trace", truth.sum()), ("frobenius", (truth**2).sum() ** 0.5)):
        assert abs(values[output].value - expected) <= 4 * values[output].stderr + 1e-6
    negative = -truth[truth < 0].sum() / np.abs(truth).sum()
    assert abs(values["negative"].value - negative) <= 4 * values["negative"].stderr + 0.02
    assert truth[0] - 1e-6 <= values["smallest"] <= values["largest"] <= truth[-1] + 1e-6
    assert values["largest"] == pytest.approx(truth[-1], rel=1e-3)
    assert values["outliers_seen"] <= (truth > values["bulk_edge"]).sum()
    grid, density = values["density"]
    assert np.trapezoid(density, grid) == pytest.approx(1.0, abs=1e-2)
    assert values["band"].shape == values["density"].shape
    assert (values["band"][0] == grid).all()


def test_the_errors_of_the_moments_cover() -> None:
    built = case("mlp")
    truth = eigenvalues(built)
    expected = {
        "trace": truth.sum(),
        "frobenius": (truth**2).sum() ** 0.5,
        "negative": -truth[truth < 0].sum() / np.abs(truth).sum(),
    }
    found = [take(SpectralDensity(steps=8), built, step=seed)[0] for seed in range(100)]
    for output, value in expected.items():
        inside = sum(abs(v[output].value - value) <= 3 * v[output].stderr for v in found)
        assert inside >= 93, output
    biases = [v["trace"].value - expected["trace"] for v in found]
    assert abs(np.mean(biases)) <= 4 * np.std(biases) / len(biases) ** 0.5


def test_outliers_are_told_from_the_bulk() -> None:
    c = torch.cat([torch.tensor([40.0, 30.0, 20.0]), torch.linspace(-0.5, 0.5, 57)]).double()
    model = nn.Linear(60, 1, bias=False).double()
    built = Built(model, lambda call, x: 60 * c * call(x)[:, 0].square() / 2, torch.eye(60, dtype=torch.float64))
    values, _, _ = take(SpectralDensity(probes=20), built)
    assert values["outliers_seen"] == 3.0
    assert abs(values["outliers"].value - 3.0) <= 3 * values["outliers"].stderr
    assert 0.5 < values["bulk_edge"] < 20.0
    assert SpectralDensity(probes=2, steps=5).needs == {"hessian"}
    for settings in ({"probes": 1}, {"steps": 0}):
        with pytest.raises(ValueError, match="expected"):
            SpectralDensity(**settings)
