"""r and alpha of a step against dense Hessians, closed forms and the convention of its sign."""

from typing import Any

import pytest
import torch
from cases import BY_NAME, CASES, Case, build
from torch import nn
from twins import dense_hessian, trainable

from instruments import Probe, Refusal, View
from instruments.objective import as_objective
from instruments.step.step_ratio import StepRatio


class Parabola(nn.Module):
    def __init__(self, curvature: list[float], start: list[float]) -> None:
        super().__init__()
        self.curvature = torch.tensor(curvature, dtype=torch.float64)
        self.theta = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.curvature * self.theta.square()).sum() / 2 + 0 * x


def losses(call: Any, x: Any) -> torch.Tensor:
    return call(x)


def read(model: nn.Module, loss: Any, batches: list[Any], move: Any) -> dict[str, Any]:
    probe = Probe(model, as_objective(loss), [], batches)
    probe.remember()
    with torch.no_grad():
        move()
    instrument = StepRatio()
    with probe:
        return dict(instrument.read(View(probe, instrument.needs)))


@pytest.mark.parametrize(("eta", "alpha"), [(0.01, -0.98), (0.5, 0.0), (1.0, 1.0), (1.5, 2.0)])
def test_gradient_descent_on_a_parabola(eta: float, alpha: float) -> None:
    """alpha = eta * curvature - 1: minimum at 0, mirrored at 1, and r = eta * curvature / 2."""
    model = Parabola([2.0], [3.0])
    values = read(
        model, losses, [torch.zeros(2, dtype=torch.float64)], lambda: model.theta.sub_(eta * 2.0 * model.theta)
    )
    assert values["alpha"].value == pytest.approx(alpha, abs=1e-12)
    assert values["r"].value == pytest.approx((alpha + 1) / 2, abs=1e-12)
    assert values["update_norm"] == pytest.approx(eta * 6.0)


def test_negative_curvature_reads_below_minus_one() -> None:
    model = Parabola([-1.0], [1.0])
    values = read(model, losses, [torch.zeros(2, dtype=torch.float64)], lambda: model.theta.add_(0.1))
    assert values["r"].value == pytest.approx(-0.05)
    assert values["alpha"].value < -1


def test_a_step_uphill_or_none_has_no_ratio() -> None:
    model = Parabola([1.0], [1.0])
    values = read(model, losses, [torch.zeros(2, dtype=torch.float64)], lambda: model.theta.add_(0.1))
    assert values["r"].value != values["r"].value
    assert values["slope"] == pytest.approx(0.1)
    values = read(model, losses, [torch.zeros(2, dtype=torch.float64)], lambda: None)
    assert values["alpha"].value != values["alpha"].value
    assert values["update_norm"] == 0


SMOOTH = [case for case in CASES if not case.random and case.name != "in_place_relu"]


@pytest.mark.parametrize("case", SMOOTH, ids=lambda case: case.name)
def test_small_steps_measure_the_curvature_along_them(case: Case) -> None:
    """r = 1/2 u'Hu / (-g'u) for a short step along the negative gradient, whatever the model and the loss."""
    built = build(case)
    params = list(trainable(built.model).values())
    loss = as_objective(built.loss).parts(built.model, built.batch).loss
    grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
    g_D = torch.cat([g.reshape(-1) for g in grads])
    h = dense_hessian(built.model, built.loss, built.batch)
    eta = 1e-4 / float(g_D.norm())

    def step() -> None:
        for p, g in zip(params, grads, strict=True):
            p.sub_(eta * g)

    values = read(built.model, built.loss, [built.batch], step)
    expected = 0.5 * eta * float(g_D @ h @ g_D) / float(g_D @ g_D)
    assert values["r"].value == pytest.approx(expected, rel=2e-2, abs=1e-7)


def test_dropout_compares_both_ends_under_one_mask() -> None:
    """With other masks at the other end the change would be dominated by the masks."""
    built = build(BY_NAME["dropout"])
    weight = built.model[0].weight
    values = read(built.model, built.loss, [built.batch], lambda: weight.add_(1e-6))
    assert abs(values["change"] - values["slope"]) < 1e-4 * abs(values["slope"]) + 1e-12


def test_micro_batches_are_pooled() -> None:
    built = build(BY_NAME["mlp_weighted"])
    x, y = built.batch
    weight, kept = built.model[0].weight, built.model[0].weight.detach().clone()

    def move() -> None:
        weight.add_(-0.01 * torch.ones_like(weight))

    together = read(built.model, built.loss, [(x, y)], move)
    with torch.no_grad():
        weight.copy_(kept)
    apart = read(built.model, built.loss, [(x[:2], y[:2]), (x[2:], y[2:])], move)
    assert apart["change"] == pytest.approx(together["change"], rel=1e-10)
    assert apart["slope"] == pytest.approx(together["slope"], rel=1e-10)


def test_rounding_is_the_error_bar_in_float32() -> None:
    """A tiny step in single precision: the truth lies within the stated error, which is not negligible."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    batch = (torch.randn(16, 4), torch.randint(0, 3, (16,)))
    grads = torch.autograd.grad(nn.functional.cross_entropy(model(batch[0]), batch[1]), list(model.parameters()))

    def step() -> None:
        for p, g in zip(model.parameters(), grads, strict=True):
            p.sub_(1e-5 * g)

    values = read(model, nn.CrossEntropyLoss(), [batch], step)
    assert abs(values["r"].value) <= 3 * values["r"].stderr
    assert values["r"].stderr > 1e-3


def test_without_the_parameters_before_it_is_refused() -> None:
    model = Parabola([1.0], [1.0])
    instrument = StepRatio()
    with (
        Probe(model, as_objective(losses), [], [torch.zeros(2, dtype=torch.float64)]) as probe,
        pytest.raises(Refusal, match="before the step"),
    ):
        instrument.read(View(probe, instrument.needs))
