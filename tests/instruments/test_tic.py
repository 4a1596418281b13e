"""Takeuchi's criterion against dense matrices and gradients of single examples."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import Built
from gauss_newton_twin import dense_gauss_newton
from taking import SOME, case, mean_of, sizes, take
from twins import example_gradients

from instruments.curvature.tic import FLOOR, Tic, by_coordinate, by_tensor
from instruments.linalg.trace import Diagonal, diagonal
from instruments.operators.operator import DenseOperator

DRAWS = 300


def twin(built: Built) -> dict[str, float]:
    """From the definition, with every entry of the diagonal of the Gauss-Newton matrix known."""
    h = dense_gauss_newton(built).diagonal().tolist()
    c = example_gradients(built.model, built.loss, built.batch).square().mean(0).tolist()
    positive = sorted(x for x, y in zip(h, c, strict=True) if x > 0 and y > 0)
    floor = FLOOR * positive[(len(positive) - 1) // 2]
    layers, at = 0.0, 0
    for d in sizes(built):
        noise, curvature = sum(c[at : at + d]), sum(h[at : at + d])
        layers += d * noise / curvature if noise else 0.0
        at += d
    return {
        "tic_layers": layers,
        "tic_trace": sum(c) / sum(h),
        "tic_diagonal": sum(y / max(x, floor) for x, y in zip(h, c, strict=True)),
        "trace_of_second_moment": sum(c),
        "trace_of_curvature": sum(h),
    }


@pytest.mark.parametrize("name", SOME)
def test_the_trace_forms_agree_within_their_errors(name: str) -> None:
    built = case(name)
    truth = twin(built)
    for step in range(3):
        values, _, provenance = take(Tic(probes=32), built, step=step)
        assert float(values["trace_of_second_moment"].value) == pytest.approx(truth["trace_of_second_moment"])
        curvature = values["trace_of_curvature"]
        assert abs(float(curvature.value) - truth["trace_of_curvature"]) <= 4 * float(curvature.stderr)
        # Only the noise of the curvature: these are the very examples that the twin has seen.
        relative = float(curvature.stderr / curvature.value)
        assert abs(float(values["tic_trace"].value) / truth["tic_trace"] - 1) <= 5 * relative
        # By tensor each trace has an error of its own, and the sum of the inverses is a little too large.
        assert float(values["tic_layers"].value) == pytest.approx(truth["tic_layers"], rel=0.5)
        assert provenance["batch"] == "step and held"


@pytest.mark.parametrize("name", SOME)
def test_the_layer_form_converges_to_the_twin(name: str) -> None:
    built = case(name)
    g_ND = example_gradients(built.model, built.loss, built.batch)
    norms_sq_NL = torch.stack([piece.square().sum(1) for piece in g_ND.split(sizes(built), 1)], 1)
    ends = torch.tensor([0, *sizes(built)]).cumsum(0).tolist()
    pieces = [slice(a, b) for a, b in pairwise(ends)]
    found = diagonal(DenseOperator(dense_gauss_newton(built)), probes=5_000, seed=0)
    estimate = by_tensor(norms_sq_NL, found, pieces, sizes(built))
    assert float(estimate.value) == pytest.approx(twin(built)["tic_layers"], rel=0.05)


def test_the_diagonal_form_converges_to_the_twin() -> None:
    built = case("mlp")
    truth = twin(built)["tic_diagonal"]
    second_D = example_gradients(built.model, built.loss, built.batch).square().mean(0)
    found, floored = by_coordinate(second_D, diagonal(DenseOperator(dense_gauss_newton(built)), probes=20_000, seed=0))
    assert float(found.value) == pytest.approx(truth, rel=0.05)
    assert float(floored) == 0.0
    noisy, _ = by_coordinate(second_D, diagonal(DenseOperator(dense_gauss_newton(built)), probes=100, seed=0))
    assert float(noisy.value) > truth  # 1/h of a noisy h is too large


def test_a_curvature_without_noise_has_an_exact_criterion() -> None:
    """loss_i = |theta - x_i|^2 / 2: H = I, tr(H^-1 C) = mean |x_i|^2, and its error is that of the examples."""
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values, _, _ = take(Tic(matrix="hessian"), mean_of(x))
    norms = x.square().sum(1)
    assert float(values["tic_diagonal"].value) == pytest.approx(float(norms.mean()))
    assert float(values["tic_diagonal"].stderr) == pytest.approx(0.0, abs=1e-9)
    assert float(values["tic_layers"].value) == pytest.approx(float(norms.mean()))
    assert float(values["tic_layers"].stderr) == pytest.approx(float(norms.std() / 50**0.5))
    assert float(values["tic_trace"].value) == pytest.approx(float(norms.mean()) / 6)
    assert float(values["tic_trace"].stderr) == pytest.approx(float(norms.std() / 50**0.5) / 6)


def test_the_error_over_examples_covers() -> None:
    """E tr C / tr H = D/D = 1 for normal x."""
    inside = 0
    for seed in range(DRAWS):
        x = torch.randn(30, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found = take(Tic(matrix="hessian", probes=2), mean_of(x))[0]["tic_trace"]
        inside += abs(float(found.value) - 1.0) <= 3 * float(found.stderr)
    assert inside >= 0.97 * DRAWS


def test_the_error_of_the_diagonal_form_covers_small_noise() -> None:
    """Entries known to some percent: the first order holds, and the bound is no wider than sqrt(2) allows."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(20, 20, generator=g, dtype=torch.float64)
    matrix = 0.05 * (a + a.T) + 5 * torch.eye(20, dtype=torch.float64)
    second = torch.rand(20, generator=g, dtype=torch.float64)
    truth = float((second / matrix.diagonal()).sum())
    errors, bars = [], []
    for _ in range(DRAWS):
        d_nD = torch.stack([x * (matrix @ x) for x in torch.randn(8, 20, generator=g, dtype=torch.float64).sign()])
        found, floored = by_coordinate(second, Diagonal(d_nD.mean(0), d_nD.var(0) / 8, d_nD[:0]))
        errors.append(float(found.value) - truth)
        bars.append(float(found.stderr))
        assert float(floored) == 0.0
    inside = sum(abs(e) <= 3 * b for e, b in zip(errors, bars, strict=True))
    assert inside >= 0.98 * DRAWS
    assert 0.8 < (sum(b * b for b in bars) / sum(e * e for e in errors)) ** 0.5 < 1.41 * 1.2


def test_low_entries_are_floored_and_counted() -> None:
    """One of twenty is floored; one without a gradient is not counted; with three of them the sum is not known."""
    h = torch.cat([torch.full((19,), 2.0), torch.tensor([-1.0, -5.0])]).double()
    c = torch.cat([torch.ones(20), torch.zeros(1)]).double()
    found, floored = by_coordinate(c, Diagonal(h, torch.zeros_like(h), h[None][:0]))
    assert float(found.value) == pytest.approx(19 / 2 + 1 / (FLOOR * 2.0))
    assert float(floored) == pytest.approx(1 / 20)
    h[:2] = 1e-9
    found, floored = by_coordinate(c, Diagonal(h, torch.zeros_like(h), h[None][:0]))
    assert torch.isnan(torch.as_tensor(found.value))
    assert float(floored) == pytest.approx(3 / 20)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [([2.0, 4.0], 2 * (1 + 1) / 6), ([1.0, -0.9], 2 * (1 + 1) / 0.5), ([1.0, -3.0], None), ([0.0, 0.0], None)],
)
def test_a_trace_is_no_smaller_than_its_error_unless_it_is_negative(entries: list[float], expected: Any) -> None:
    """One tensor of two coordinates whose trace has the standard error 0.5; gradients of squared length 2."""
    error = 0.0 if entries == [0.0, 0.0] else 0.5
    h_D = torch.tensor(entries, dtype=torch.float64)
    found = Diagonal(h_D, torch.full_like(h_D, error**2 / 4), h_D[None][:0])
    norms_sq_NL = torch.full((3, 1), 2.0, dtype=torch.float64)
    value = by_tensor(norms_sq_NL, found, [slice(0, 2)], [2]).value
    assert float(value) == pytest.approx(expected) if expected else torch.isnan(torch.as_tensor(value))


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_no_curvature_is_nan(value: float) -> None:
    built: Any = case("mlp")
    with torch.no_grad():
        built.model[2].weight.fill_(value)
        built.model[0].weight.fill_(value)
    if value == 0.0:
        built = mean_of(torch.zeros(4, 3, dtype=torch.float64))
    values, _, _ = take(Tic(), built) if value != 0.0 else take(Tic(matrix="hessian"), built)
    if value == 0.0:
        assert float(values["tic_trace"].value) == 0.0
    else:
        assert torch.isnan(values["tic_trace"].value)
        assert values["tic_diagonal"].value != values["tic_diagonal"].value
