"""The trace of the curvature and of its layers, judged by its own error bars against dense matrices."""

from typing import Any

import pytest
import torch
from cases import Built
from gauss_newton_twin import dense_gauss_newton
from taking import case, mean_of, sizes, take
from torch import nn
from twins import dense_hessian

from instruments.curvature.trace import CurvatureTrace

DRAWS = 300
NAMES = ["mlp", "mlp_weighted", "cnn_plain", "tied_attention", "recurrent", "called_twice_unused", "frozen"]


def dense(built: Built, matrix: str) -> torch.Tensor:
    if matrix == "hessian":
        return dense_hessian(built.model, built.loss, built.batch)
    return dense_gauss_newton(built)


def layers(built: Built, matrix: str) -> list[float]:
    return [float(piece.sum()) for piece in dense(built, matrix).diagonal().split(sizes(built))]


def readings(instrument: CurvatureTrace, built: Built, count: int, start: int = 0) -> list[dict[str, Any]]:
    """One after the other, with the memory of the ones before."""
    state, found = None, []
    for step in range(start, start + count):
        values, state, _ = take(instrument, built, state=state, step=step)
        found.append(values)
    return found


@pytest.mark.parametrize("matrix", ["gauss_newton", "hessian"])
@pytest.mark.parametrize("name", NAMES)
def test_traces_agree_with_the_dense_matrix(name: str, matrix: Any) -> None:
    built = case(name)
    truth = torch.tensor(layers(built, matrix), dtype=torch.float64)
    for values in readings(CurvatureTrace(matrix=matrix, probes=24), built, 4):
        total = values["trace"]
        assert abs(total.value - truth.sum()) <= 4 * total.stderr + 1e-7
        assert float(values["mean"].value) == pytest.approx(float(total.value) / sum(sizes(built)))
        assert float(values["per_layer"].sum()) == pytest.approx(float(total.value))
        assert ((values["per_layer"] - truth).abs() <= 4 * values["per_layer_stderr"] + 1e-7).all()


@pytest.mark.parametrize("matrix", ["gauss_newton", "hessian"])
def test_the_standard_errors_cover_and_are_not_too_wide(matrix: Any) -> None:
    built = case("mlp")
    truth = torch.tensor(layers(built, matrix), dtype=torch.float64)
    found = readings(CurvatureTrace(matrix=matrix), built, DRAWS)
    errors_nL = torch.stack([values["per_layer"] - truth for values in found])
    bars_nL = torch.stack([values["per_layer_stderr"] for values in found])
    error_n = torch.tensor([float(values["trace"].value - truth.sum()) for values in found])
    bar_n = torch.tensor([float(values["trace"].stderr) for values in found])
    assert (error_n.abs() <= 3 * bar_n).double().mean() >= 0.97
    assert ((errors_nL.abs() <= 3 * bars_nL).double().mean(0) >= 0.97).all()
    assert abs(error_n.mean()) <= 4 * error_n.std() / DRAWS**0.5  # no bias
    assert 0.7 < (bar_n.square().mean() / error_n.square().mean()) ** 0.5 < 1.4
    ratio_L = (bars_nL.square().mean(0) / errors_nL.square().mean(0)).sqrt()
    assert (ratio_L > 0.8).all()
    assert (ratio_L < 1.41 * 1.2).all()


def test_what_is_remembered_makes_the_error_smaller() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 12, dtype=torch.float64) @ torch.diag(torch.tensor([30.0, 20.0, 10.0] + 9 * [1.0])).double()
    built = Built(nn.Linear(12, 2).double(), nn.MSELoss(), (x, torch.randn(40, 2, dtype=torch.float64)))
    truth = float(dense_gauss_newton(built).trace())
    kept = readings(CurvatureTrace(deflate=6), built, 6)
    plain = readings(CurvatureTrace(probes=18, deflate=0), built, 6)
    assert float(kept[-1]["trace"].stderr) < 0.3 * float(plain[-1]["trace"].stderr)
    assert abs(float(kept[-1]["trace"].value) - truth) <= 4 * float(kept[-1]["trace"].stderr) + 1e-9 * truth


def test_a_diagonal_matrix_is_read_without_error() -> None:
    """Signs see it exactly as long as nothing is projected out."""
    instrument = CurvatureTrace(matrix="hessian", deflate=0)
    for values in readings(instrument, mean_of(torch.randn(5, 7, dtype=torch.float64)), 2):
        assert float(values["trace"].value) == pytest.approx(7.0)
        assert float(values["trace"].stderr) == pytest.approx(0.0, abs=1e-6)


def test_another_number_of_parameters_and_nan_start_afresh() -> None:
    instrument = CurvatureTrace()
    _, state, _ = take(instrument, case("mlp"))
    values, state, _ = take(instrument, case("frozen"), state=state)
    assert float(values["trace"].value) > 0
    broken = case("frozen")
    with torch.no_grad():
        broken.model[2].weight.fill_(torch.nan)
    values, state, _ = take(instrument, broken, state=state)
    assert torch.isnan(values["trace"].value)
    values, _, _ = take(instrument, case("frozen"), state=state)
    assert float(values["trace"].value) > 0


def test_settings_that_mean_nothing_are_refused() -> None:
    assert CurvatureTrace(matrix="hessian").needs == {"hessian"}
    assert CurvatureTrace().needs == CurvatureTrace.needs == {"gauss_newton"}
    with pytest.raises(ValueError, match="matrix to be one of gauss_newton, hessian, got 'fisher'"):
        CurvatureTrace(matrix="fisher")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="probes of at least 2"):
        CurvatureTrace(probes=1)
