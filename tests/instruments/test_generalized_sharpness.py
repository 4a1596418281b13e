"""Sharpness in the norm of a step: against every corner where they can be counted, and closed forms where they exist.

Shapes: D = trainable scalars, C = corners.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import Built
from taking import case, losses, take
from torch import Tensor, nn, optim
from twins import dense_hessian, total_loss

from instruments.curvature._unit_ball import Norm, UnitBall, sharpest_corner
from instruments.curvature.generalized_sharpness import GeneralizedSharpness
from instruments.curvature.preconditioned_sharpness import PreconditionedSharpness
from instruments.layout import Layout
from instruments.operators.operator import DenseOperator
from instruments.refusal import Refusal
from instruments.step.step_ratio import StepRatio


def ball_of(norm: Norm, *shapes: tuple[int, ...]) -> UnitBall:
    params = tuple(torch.zeros(shape, dtype=torch.float64) for shape in shapes)
    return UnitBall(norm, Layout(tuple(map(str, range(len(params)))), params))


def search(h_DD: Tensor, ball: UnitBall, starts: int, max_products: int = 12) -> float:
    drawn = [ball.corner(torch.randn(len(h_DD), dtype=torch.float64)) for _ in range(starts)]
    best, lowest = sharpest_corner(DenseOperator(h_DD), ball, drawn, tol=1e-3, max_products=max_products)
    assert best.value >= lowest
    assert float(best.corner_D @ h_DD @ best.corner_D) == pytest.approx(best.value)
    return best.value


def matrix(values_D: Tensor) -> Tensor:
    q_DD, _ = torch.linalg.qr(torch.randn(len(values_D), len(values_D), dtype=torch.float64))
    return (q_DD * values_D) @ q_DD.T


def like_a_network(size: int) -> Tensor:
    """Two outliers and a bulk of both signs."""
    return matrix(torch.cat([torch.tensor([10.0, 3.0]), 0.5 * torch.randn(size - 2)]).double())


def by_signs(h_DD: Tensor) -> float:
    """Every sign vector but for a factor -1."""
    size = len(h_DD)
    corners_CD = ((torch.arange(2 ** (size - 1))[:, None] >> torch.arange(size)) & 1).double() * 2 - 1
    return float(((corners_CD @ h_DD) * corners_CD).sum(1).max())


def by_angles(h_DD: Tensor) -> float:
    """Every pair of orthogonal 2 x 2 matrices, turned in steps of a degree and a half: rotations and reflections."""
    angles_C = torch.arange(0, 2 * math.pi, math.pi / 120, dtype=torch.float64)
    cos, sin = angles_C.cos(), angles_C.sin()
    turns_C4 = torch.cat([torch.stack([cos, -sin, sin, cos], 1), torch.stack([cos, sin, sin, -cos], 1)])
    first, second = h_DD[:4, :4], h_DD[4:, 4:]
    own = ((turns_C4 @ first) * turns_C4).sum(1)[:, None] + ((turns_C4 @ second) * turns_C4).sum(1)[None]
    return float((own + 2 * turns_C4 @ h_DD[:4, 4:] @ turns_C4.T).max())


@pytest.mark.parametrize(("norm", "shapes"), [("max", ((12,),)), ("spectral", ((2, 2), (2, 2)))])
def test_it_is_the_best_of_all_corners_and_never_above(norm: Norm, shapes: tuple[tuple[int, ...], ...]) -> None:
    torch.manual_seed(0)
    ball, exhaustive = ball_of(norm, *shapes), by_signs if norm == "max" else by_angles
    slack = 1e-9 if norm == "max" else 1e-3  # of the grid of angles
    shares = []
    for _ in range(40):
        h_DD = like_a_network(sum(map(math.prod, shapes)))
        shares.append(search(h_DD, ball, starts=4) / exhaustive(h_DD))
    assert max(shares) < 1 + slack
    assert np.mean(np.array(shares) > 1 - slack) >= 0.9
    assert min(shares) > 0.7


@pytest.mark.parametrize("norm", ["max", "spectral"])
def test_of_one_direction_it_is_the_square_of_the_dual_norm(norm: Norm) -> None:
    """H = g g': max (g'd)^2; and the identity, where every corner is as good: how long a corner is."""
    torch.manual_seed(1)
    ball = ball_of(norm, (3, 4), (5,), (2, 2, 2))
    g_D = torch.randn(25, dtype=torch.float64)
    pieces = [g_D[:12].view(3, 4), g_D[17:].view(2, 4)]
    nuclear = sum(float(torch.linalg.svdvals(piece).sum()) for piece in pieces) + float(g_D[12:17].abs().sum())
    dual = float(g_D.abs().sum()) if norm == "max" else nuclear
    assert float(g_D @ ball.corner(g_D)) == pytest.approx(dual)
    assert search(torch.outer(g_D, g_D), ball, starts=2) == pytest.approx(dual**2, rel=2e-3)
    assert search(torch.eye(25).double(), ball, starts=1) == pytest.approx(25 if norm == "max" else 3 + 5 + 2)


def test_a_curvature_of_signs_is_the_sum_of_its_diagonal() -> None:
    d_D = torch.tensor([3.0, 0.5, 2.0]).double()
    assert search(torch.diag(d_D), ball_of("max", (3,)), starts=1) == pytest.approx(5.5)


def test_corners_where_the_gradient_vanishes_are_of_the_ball() -> None:
    for norm, shapes in (("max", ((3,),)), ("spectral", ((2, 3), (2,)))):
        ball = ball_of(norm, *shapes)  # type: ignore[arg-type]
        zero_D = torch.zeros(sum(map(math.prod, shapes)), dtype=torch.float64)
        corner_D = ball.corner(zero_D)
        assert torch.equal(ball.corner(corner_D), corner_D)
        assert torch.equal(ball.corner(zero_D, -corner_D), -corner_D)


@pytest.mark.parametrize("norm", ["max", "spectral"])
def test_a_reading_is_that_of_the_dense_hessian(norm: Norm) -> None:
    built = case("mlp")
    h_DD = dense_hessian(built.model, built.loss, built.batch)
    instrument = GeneralizedSharpness(norm=norm, max_products=30)
    values, state, _ = take(instrument, built)
    corner_D, ball = state["corner_D"], UnitBall(norm, Layout.of(built.model))
    assert values["sharpness"] == pytest.approx(float(corner_D @ h_DD @ corner_D), rel=1e-6)
    assert values["converged"] == 1
    torch.manual_seed(2)
    assert 0.85 * (best := search(h_DD, ball, starts=60, max_products=60)) < values["sharpness"] < best * 1.001
    again, _, _ = take(instrument, built, state=state, step=1)
    assert again["sharpness"] >= values["sharpness"] * (1 - 1e-9)


@pytest.mark.parametrize("norm", ["max", "spectral"])
def test_below_the_critical_learning_rate_a_step_of_the_norm_lowers_the_quadratic(norm: Norm) -> None:
    """u = -eta d for the corner d of the gradient, as signSGD and Muon without momentum step: r = 1/2 u'Hu / (-g'u)."""
    built = case("mlp_squared")
    h_DD = dense_hessian(built.model, built.loss, built.batch)
    values, _, _ = take(GeneralizedSharpness(norm=norm, starts=20), built)
    ball, params = UnitBall(norm, Layout.of(built.model)), list(built.model.parameters())
    grads = torch.autograd.grad(total_loss(built.model, built.loss, built.batch), params)
    g_D = torch.cat([g.reshape(-1) for g in grads])
    assert values["critical_learning_rate"] == pytest.approx(2 * values["dual_norm"] / values["sharpness"])
    u_D = -values["critical_learning_rate"] * ball.corner(g_D)
    assert values["dual_norm"] == pytest.approx(-float(g_D @ u_D) / values["critical_learning_rate"])
    assert float(u_D @ h_DD @ u_D) / 2 <= -float(g_D @ u_D) * (1 + 1e-9)


@pytest.mark.parametrize("make", [optim.Muon, optim.Rprop])
def test_the_step_ratio_is_what_is_read_of_such_a_step(make: Any) -> None:
    """r = 1/2 u'Hu / (-g'u) on a quadratic, where the refusal of rho sends one."""
    built = Built(Bowl(), losses, torch.randn(4, 6, dtype=torch.float64))
    total_loss(built.model, built.loss, built.batch).backward()
    (p,), optimizer = built.model.parameters(), make(built.model.parameters(), lr=0.01)
    before, g_D = p.detach().clone(), p.grad.reshape(-1)
    h_DD = dense_hessian(built.model, built.loss, built.batch)
    with pytest.raises(Refusal, match=f"not defined for {make.__name__}: .*step/step_ratio"):
        take(PreconditionedSharpness(), built, [optimizer])
    values, _, _ = take(StepRatio(), built, [optimizer], move=optimizer.step)
    u_D = (p.detach() - before).reshape(-1)
    assert values["r"].value == pytest.approx(float(u_D @ h_DD @ u_D / 2 / -(g_D @ u_D)), rel=1e-6)


class Bowl(nn.Module):
    """loss_i = (W . x_i)^2 + 1/2 |W|^2, quadratic in the matrix W."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.w.reshape(-1)).square() + self.w.square().sum() / 2


def test_steepest_descent_by_signs_turns_at_its_edge() -> None:
    """theta+ = theta - eta |g|_1 sign(g): falls at every step below 2/S, and along the sharpest corner not above it."""
    torch.manual_seed(3)
    h_DD = matrix(torch.logspace(-1, 1, 8, dtype=torch.float64))
    s = by_signs(h_DD)
    assert search(h_DD, ball_of("max", (8,)), starts=20) == pytest.approx(s)
    for _ in range(20):
        x = torch.randn(8, dtype=torch.float64)
        for _ in range(30):
            g = h_DD @ x
            after = x - 0.99 * 2 / s * g.abs().sum() * g.sign()
            assert after @ h_DD @ after < x @ h_DD @ x
            x = after


@pytest.mark.parametrize("norm", ["max", "spectral"])
def test_a_broken_model_is_nan(norm: Norm) -> None:
    built = case("mlp")
    with torch.no_grad():
        built.model[0].weight[0, 0] = float("nan")
    values, state, _ = take(GeneralizedSharpness(norm=norm), built)
    assert math.isnan(values["sharpness"])
    assert math.isnan(values["critical_learning_rate"])
    assert state["corner_D"] is None


def test_no_positive_curvature_is_no_limit() -> None:
    class Negative(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return -(self.w * x).square().sum(1)

    built = Built(Negative(), losses, torch.ones(2, 3, dtype=torch.float64))
    values, _, _ = take(GeneralizedSharpness(), built)
    assert (values["sharpness"], values["critical_learning_rate"]) == (0.0, math.inf)


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="expected norm to be one of max, spectral, got 'nuclear'"):
        GeneralizedSharpness(norm="nuclear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="starts"):
        GeneralizedSharpness(starts=0)
