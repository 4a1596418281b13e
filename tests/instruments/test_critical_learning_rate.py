"""Critical and best multiples of a step: exact on parabolas, bracketed elsewhere, flagged where there is none."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from instruments import Probe, View
from instruments.objective import as_objective
from instruments.step.critical_learning_rate import CriticalLearningRate

BATCH = torch.zeros(2, dtype=torch.float64)


class Line(nn.Module):
    """One parameter, a loss of it."""

    def __init__(self, f: Callable[[Tensor], Tensor], start: float) -> None:
        super().__init__()
        self.f, self.theta = f, nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.theta) + 0 * x


def read(f: Callable[[Tensor], Tensor], start: float, step: float, **settings: Any) -> tuple[dict[str, Any], View]:
    model = Line(f, start)
    optimizer = optim.SGD([{"params": [model.theta], "lr": 0.1}, {"params": [torch.zeros(1)], "lr": 0.3}])
    instrument = CriticalLearningRate(**settings)
    probe = Probe(model, as_objective(lambda call, x: call(x)), [optimizer], [BATCH])
    probe.remember()
    with torch.no_grad():
        model.theta.add_(step)
    with probe:
        view = View(probe, instrument.needs)
        values = dict(instrument.read(view))
    assert float(model.theta.detach()) == start + step
    return values, view


@pytest.mark.parametrize("critical", [0.15, 0.9, 1.0001, 2.0, 7.3, 40.0, 99.0])
def test_a_parabola_is_read_exactly(critical: float) -> None:
    """Curvature 2, start 1, best step -1: a step of -2 / critical has its critical multiple at `critical`."""
    values, view = read(lambda t: t.square(), 1.0, -2 / critical)
    assert values["critical"] == pytest.approx(critical, rel=1e-9)
    assert values["best"] == pytest.approx(critical / 2, rel=1e-9)
    assert values["low"] <= critical <= values["high"]
    assert values["high"] / values["low"] < 1.4
    assert values["critical_learning_rate"].tolist() == pytest.approx([0.1 * critical, 0.3 * critical])
    assert values["best_learning_rate"].tolist() == pytest.approx([0.05 * critical, 0.15 * critical])
    assert (values["still_falling"], values["rises_at_once"]) == (0, 0)
    assert view.meter.gradients == pytest.approx(values["forwards"] / 3)


def test_the_search_stops_at_the_first_rise() -> None:
    values, _ = read(lambda t: t.square(), 1.0, -1.0, refinements=0)
    assert (values["low"], values["high"]) == (1, 3)
    assert values["forwards"] == 5  # 0, 0.1, 0.3, 1, 3


def test_a_quartic_is_bracketed_ever_closer() -> None:
    """(1 - m/2)^4 is back at 1 for m = 4."""
    errors = []
    for refinements in (0, 3, 8):
        values, _ = read(lambda t: t**4, 1.0, -0.5, refinements=refinements)
        assert values["low"] <= 4 <= values["high"]
        errors.append(abs(values["critical"] - 4))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3


def test_a_loss_that_keeps_falling_is_flagged() -> None:
    values, _ = read(lambda t: (-t).exp(), 0.0, 1e-2)
    assert (values["still_falling"], values["rises_at_once"]) == (1, 0)
    assert (values["critical"], values["best"], values["high"]) == (100, 100, math.inf)


def test_a_step_uphill_is_flagged() -> None:
    values, _ = read(lambda t: t.square(), 1.0, 0.5)
    assert (values["still_falling"], values["rises_at_once"]) == (0, 1)
    assert (values["critical"], values["best"], values["low"]) == (0, 0, 0)
    assert values["high"] == pytest.approx(1e-3)


def test_far_too_long_a_step_is_found_below_the_ladder() -> None:
    values, _ = read(lambda t: t.square(), 1.0, -100.0)
    assert values["critical"] == pytest.approx(0.02, rel=1e-9)
    assert values["rises_at_once"] == 0


def test_where_the_loss_ends_the_bound_is_the_last_finite_multiple() -> None:
    """-sqrt(t) falls up to the edge t = 0 of its domain and is NaN beyond."""
    values, _ = read(lambda t: -(2 - t).sqrt() + t, 1.0, -0.5, multipliers=(1.0, 3.0))
    assert math.isfinite(values["critical"])
    values, _ = read(lambda t: (t - 2).log(), 4.0, -1.0, multipliers=(0.5, 1.0, 10.0), refinements=4)
    assert values["critical"] == values["low"]
    assert 1.7 < values["low"] < 2 < values["high"]
    assert values["best"] == values["low"]


def test_a_loss_that_is_not_finite_at_the_start_reads_nan() -> None:
    values, _ = read(lambda t: t.log(), -1.0, 3.0)
    assert all(math.isnan(x) for name in ("critical", "best", "low", "high", "still_falling") for x in [values[name]])
    assert values["forwards"] == 1


@pytest.mark.parametrize(("f", "step"), [(Tensor.square, 0.0), (lambda t: 0 * t + 2, 1.0)], ids=["no_step", "flat"])
def test_a_loss_that_is_the_same_all_along_has_no_critical_multiple(f: Callable[[Tensor], Tensor], step: float) -> None:
    values, _ = read(f, 1.0, step)
    assert values.pop("forwards") == 8
    assert all(torch.as_tensor(value).isnan().all() for value in values.values()), values


@pytest.mark.parametrize("ladder", [(), (1.0, 0.5), (1.0, 1.0), (0.0, 1.0)])
def test_ladders_must_climb(ladder: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="positive multipliers that increase"):
        CriticalLearningRate(multipliers=ladder)
    with pytest.raises(ValueError, match="refinements"):
        CriticalLearningRate(refinements=-1)
