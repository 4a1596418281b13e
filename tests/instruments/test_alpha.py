"""alpha by example: closed forms, a jackknife written out, its error bar, and the bias that two batches would have.

Shapes: N = examples, D = trainable scalars.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import BY_NAME, CASES, Case, build
from torch import Tensor, nn
from twins import example_gradients, total_loss, trainable

from instruments import Probe, View
from instruments.objective import as_objective
from instruments.samples import kept as samples_kept
from instruments.samples.of_probe import Samples
from instruments.step.alpha import Alpha

READABLE = [case for case in CASES if case.examples and not case.random]


def read(
    model: nn.Module, loss: Any, batch: Any, move: Callable[[], object], first: frozenset[Any] = frozenset()
) -> dict[str, Any]:
    """`first` is what another instrument asks for before the step."""
    probe = Probe(model, as_objective(loss), [], [batch], expected=first | Alpha.needs)
    if first:
        with probe:
            assert View(probe, first).moments.engine == "fused"
    probe.remember()
    with torch.no_grad():
        move()
    with probe:
        return dict(Alpha().read(View(probe, Alpha.needs)))


PASS: frozenset[Any] = frozenset({"samples", "inner_products"})


@pytest.mark.parametrize("kept_bytes", [2**26, 0], ids=["kept", "too_large"])
@pytest.mark.parametrize("case", [case for case in CASES if case.examples], ids=lambda case: case.name)
def test_a_pass_before_the_step_gives_the_slopes_too(
    case: Case, kept_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples_kept, "KEPT_BYTES", kept_bytes)
    values: list[dict[str, Any]] = []
    passes: list[Any] = []
    for first in (frozenset(), PASS):
        built = build(case)
        params = list(trainable(built.model).values())
        generator = torch.Generator().manual_seed(0)

        def move(params: Any = params, generator: Any = generator) -> None:
            for p in params:
                p.sub_(1e-2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))

        with monkeypatch.context() as patch:
            patch.setattr(Samples, "inner_products", spied(Samples.inner_products, passes))
            values.append(read(built.model, built.loss, built.batch, move, first))
    assert len(passes) == (1 if kept_bytes else 2)
    for name in ("slope", "curvature"):
        alone, after_another = (value[name] for value in values)
        assert float(after_another.value) == pytest.approx(float(alone.value), rel=1e-9, abs=1e-12)
        assert float(after_another.stderr) == pytest.approx(float(alone.stderr), rel=1e-9, abs=1e-12)


class Queried(nn.Module):
    """What enters the linear layer is a view of a parameter, which the step overwrites."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.linear = nn.Parameter(torch.randn(3)), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.query.expand(len(x), -1)) * x


def test_kept_factors_do_not_move_with_the_parameters() -> None:
    torch.manual_seed(0)
    model, batch = Queried(), (torch.randn(5, 2), torch.randn(5, 2))
    start = copy.deepcopy(model.state_dict())

    def move() -> None:
        for p in model.parameters():
            p.add_(0.5)

    after_a_pass = read(model, nn.MSELoss(), batch, move, PASS)
    model.load_state_dict(start)
    alone = read(model, nn.MSELoss(), batch, move)
    assert float(after_a_pass["slope"].value) == pytest.approx(float(alone["slope"].value), rel=1e-5)


def spied(function: Any, calls: list[Any]) -> Any:
    def called(*args: Any) -> Any:
        calls.append(args)
        return function(*args)

    return called


class Quadratic(nn.Module):
    """f_i(theta) = 1/2 (theta - x_i)' diag(h) (theta - x_i): the curvature is h, the gradient noise that of h x_i."""

    def __init__(self, curvature_D: Tensor, start_D: Tensor) -> None:
        super().__init__()
        self.curvature_D, self.theta = curvature_D.double(), nn.Parameter(start_D.double().clone())

    def forward(self, x_ND: Tensor) -> Tensor:
        return ((self.theta - x_ND).square() @ self.curvature_D) / 2


def losses(call: Any, x_ND: Tensor) -> Tensor:
    return call(x_ND)


@pytest.mark.parametrize("case", READABLE, ids=lambda case: case.name)
def test_fit_and_jackknife_are_those_of_a_loop(case: Case) -> None:
    """Twin: gradients of single examples, losses before and after, and the fit repeated without each example."""
    built = build(case)
    params = list(trainable(built.model).values())
    g_ND = example_gradients(built.model, built.loss, built.batch)
    u_D = -0.05 * g_ND.mean(0)
    before = float(total_loss(built.model, built.loss, built.batch).detach())

    def move() -> None:
        for p, u in zip(params, u_D.split([p.numel() for p in params]), strict=True):
            p.add_(u.view(p.shape))

    values = read(built.model, built.loss, built.batch, move)
    after = float(total_loss(built.model, built.loss, built.batch).detach())
    slope = float(g_ND.mean(0) @ u_D)
    assert float(values["slope"].value) == pytest.approx(slope, rel=1e-8)
    assert float(values["curvature"].value) == pytest.approx(2 * (after - before - slope), rel=1e-6, abs=1e-12)
    assert float(values["alpha"].value) == pytest.approx(2 * (after - before - slope) / -slope - 1, rel=1e-6)
    assert float(values["slope"].stderr) == pytest.approx(float((g_ND @ u_D).std()) / len(g_ND) ** 0.5, rel=1e-8)
    assert float(values["alpha"].stderr) > 0


def test_the_jackknife_leaves_out_every_example() -> None:
    torch.manual_seed(0)
    x_ND, h_D = torch.randn(8, 3).double(), torch.tensor([1.0, 2.0, 3.0]).double()
    start_D, u_D = torch.tensor([2.0, 1.0, -2.0]).double(), torch.tensor([-0.5, -0.3, 0.4]).double()
    model = Quadratic(h_D, start_D)

    def alpha_of(rows: Tensor) -> float:
        before, after = (((at - rows).square() @ h_D).mean().item() / 2 for at in (start_D, start_D + u_D))
        slope = float(((start_D - rows) * h_D).mean(0) @ u_D)
        return 2 * (after - before - slope) / -slope - 1

    values = read(model, losses, x_ND, lambda: model.theta.add_(u_D))
    left = np.array([alpha_of(torch.cat([x_ND[:i], x_ND[i + 1 :]])) for i in range(8)])
    assert float(values["alpha"].value) == pytest.approx(alpha_of(x_ND), rel=1e-10)
    assert float(values["alpha"].stderr) == pytest.approx(math.sqrt(7 / 8 * np.square(left - left.mean()).sum()))


def test_the_error_bar_is_the_spread_over_batches() -> None:
    """One fixed step, 400 batches of its kind: the deviation of alpha is what one jackknife says, to 20 %."""
    generator = torch.Generator().manual_seed(1)
    h_D, u_D = torch.linspace(0.5, 2, 5).double(), torch.full((5,), -0.3).double()
    found, errors = [], []
    for _ in range(400):
        model = Quadratic(h_D, torch.full((5,), 2.0))
        x_ND = torch.randn(32, 5, generator=generator).double()
        values = read(model, losses, x_ND, lambda model=model: model.theta.add_(u_D))
        found.append(float(values["alpha"].value))
        errors.append(float(values["alpha"].stderr))
    assert np.mean(errors) == pytest.approx(np.std(found), rel=0.2)


@pytest.mark.parametrize(
    ("eta", "kappa", "distance"), [(0.01, 1.0, 3.0), (0.5, 1.0, 3.0), (0.2, 4.0, 1.0), (0.3, 1.0, 10.0)]
)
def test_two_batches_add_the_norm_test_and_one_does_not(eta: float, kappa: float, distance: float) -> None:
    """The fit of Cockpit through two successive batches has E alpha = eta kappa + theta^2 - 1; ours eta kappa - 1.

    Twin: least squares on loss and slope at both ends, each weighted by the inverse of its variance over the examples.
    The law is that of the slopes; the losses add to it in proportion to eta kappa / N.
    """
    generator = torch.Generator().manual_seed(2)
    d, n = 4000, 32
    crossed, ours, norm_tests = [], [], []
    for trial in range(40):
        first_ND, second_ND = torch.randn(2, n, d, generator=generator).double()
        model = Quadratic(torch.full((d,), kappa), torch.full((d,), distance / d**0.5))
        start_D = model.theta.detach().clone()
        g_ND = kappa * (start_D - first_ND)
        u_D = -eta * g_ND.mean(0)
        if trial < 4:
            ours.append(float(read(model, losses, first_ND, lambda m=model, u=u_D: m.theta.add_(u))["alpha"].value))
        end_D = start_D + u_D
        observed = [
            ([1, 0, 0], kappa / 2 * (start_D - first_ND).square().sum(1)),
            ([1, 1, 1], kappa / 2 * (end_D - second_ND).square().sum(1)),
            ([0, 1, 0], g_ND @ u_D),
            ([0, 1, 2], kappa * (end_D - second_ND) @ u_D),
        ]
        weights = np.array([1 / float(x_N.std()) for _, x_N in observed])
        rows = np.array([row for row, _ in observed], dtype=float) * weights[:, None]
        means = np.array([float(x_N.mean()) for _, x_N in observed]) * weights
        _, b, c = np.linalg.lstsq(rows, means, rcond=None)[0]
        crossed.append(2 * c / -b - 1)
        norm_tests.append(float((g_ND - g_ND.mean(0)).square().sum() / (n - 1) / n / g_ND.mean(0).square().sum()))
    assert ours == pytest.approx([eta * kappa - 1] * 4, abs=1e-9)
    assert np.mean(crossed) == pytest.approx(eta * kappa + np.mean(norm_tests) - 1, abs=0.02)
    assert np.mean(norm_tests) > 0.5  # so that the two laws differ by far more than the tolerance


def test_concave_and_uphill_are_said_apart_from_no_move() -> None:
    x_ND = torch.zeros(3, 1).double()
    bowl = Quadratic(torch.tensor([1.0]), torch.tensor([1.0]))
    short = read(bowl, losses, x_ND, lambda: bowl.theta.sub_(1e-3))
    assert float(short["alpha"].value) == pytest.approx(-0.999)
    assert (short["concave"], short["uphill"]) == (0, 0)
    hill = Quadratic(torch.tensor([-1.0]), torch.tensor([1.0]))
    down = read(hill, losses, x_ND, lambda: hill.theta.add_(0.5))
    assert float(down["alpha"].value) == pytest.approx(-1.5)
    assert (down["concave"], down["uphill"]) == (1, 0)
    up = read(hill, losses, x_ND, lambda: hill.theta.sub_(0.5))
    assert math.isnan(up["alpha"].value)
    assert math.isnan(up["alpha"].stderr)
    assert (up["concave"], up["uphill"]) == (1, 1)


@pytest.mark.parametrize("why", ["no_step", "no_gradient", "not_finite"])
def test_a_step_without_slope_goes_neither_uphill_nor_down(why: str) -> None:
    bowl = Quadratic(torch.tensor([1.0]), torch.tensor([math.nan if why == "not_finite" else 1.0]))
    x_ND = torch.full((3, 1), 1.0 if why == "no_gradient" else 0.0).double()
    values = read(bowl, losses, x_ND, lambda: bowl.theta.sub_(0.0 if why == "no_step" else 0.5))
    assert math.isnan(values["alpha"].value)
    assert math.isnan(values["concave"])
    assert math.isnan(values["uphill"])


def test_one_example_has_no_error_and_one_that_decides_an_infinite_one() -> None:
    bowl = Quadratic(torch.tensor([1.0]), torch.tensor([1.0]))
    alone = read(bowl, losses, torch.zeros(1, 1).double(), lambda: bowl.theta.sub_(0.5))
    assert float(alone["alpha"].value) == pytest.approx(-0.5)
    assert math.isnan(alone["alpha"].stderr)
    bowl = Quadratic(torch.tensor([1.0]), torch.tensor([0.0]))
    x_ND = torch.tensor([[-10.0], [1.0], [1.0]]).double()  # only the first wants a step to the left
    values = read(bowl, losses, x_ND, lambda: bowl.theta.sub_(0.5))
    assert values["alpha"].stderr == math.inf
    broken = read(bowl, losses, torch.tensor([[math.nan], [1.0]]).double(), lambda: bowl.theta.sub_(0.5))
    assert math.isnan(broken["alpha"].value)


@pytest.mark.parametrize("name", ["mlp", "mlp_weighted"])
def test_micro_batches_are_pooled(name: str) -> None:
    built = build(BY_NAME[name])
    x, y = built.batch
    weight, kept = built.model[0].weight, built.model[0].weight.detach().clone()
    found = []
    for batches in ([(x, y)], [(x[:2], y[:2]), (x[2:], y[2:])]):
        probe = Probe(built.model, as_objective(built.loss), [], batches)
        probe.remember()
        with torch.no_grad():
            weight.add_(-0.01 * torch.ones_like(weight))
        with probe:
            values = Alpha().read(View(probe, Alpha.needs))
        with torch.no_grad():
            weight.copy_(kept)
        found.append([float(x) for v in values.values() for x in (getattr(v, "value", v), getattr(v, "stderr", 0.0))])
    assert found[0] == pytest.approx(found[1], rel=1e-9, nan_ok=True)
