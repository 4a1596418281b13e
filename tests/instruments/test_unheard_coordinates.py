"""Coordinates that no gradient has reached: they do not move, and eps, which is all that would divide them, is no p."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from twins import dense_hessian

from instruments import Probe, View
from instruments.curvature.preconditioned_sharpness import PreconditionedSharpness
from instruments.held import HeldBatches
from instruments.layout import Layout
from instruments.objective import as_objective
from instruments.preconditioners import Preconditioner, read_preconditioner

ADAPTIVE: tuple[Callable[[Any], optim.Optimizer], ...] = (
    lambda params: optim.Adam(params, lr=0.1),
    lambda params: optim.Adam(params, lr=0.1, amsgrad=True),
    lambda params: optim.AdamW(params, lr=0.1),
    lambda params: optim.RMSprop(params, lr=0.1),
    lambda params: optim.RMSprop(params, lr=0.1, centered=True),
    lambda params: optim.NAdam(params, lr=0.1),
    lambda params: optim.RAdam(params, lr=0.1),
    lambda params: optim.Adamax(params, lr=0.1),
    lambda params: optim.Adagrad(params, lr=0.1),
    lambda params: optim.Adadelta(params, lr=0.1),
    lambda params: optim.Adafactor(params, lr=0.1),
)


def preconditioner(optimizer: optim.Optimizer, p: Tensor) -> Preconditioner:
    return read_preconditioner([optimizer], Layout(("p",), (p,)), [p.grad])


@pytest.mark.parametrize("make", ADAPTIVE)
@pytest.mark.parametrize("steps", [0, 20])
def test_coordinates_without_a_gradient_are_left_out_until_there_is_one(make: Any, steps: int) -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = make([p])
    for _ in range(steps):
        p.grad = torch.tensor([1.0, 0.0, -2.0, 0.0])
        optimizer.step()
    p.grad = torch.tensor([1.0, 0.0, 0.0, 3.0])
    found = preconditioner(optimizer, p)
    adapts = not (isinstance(optimizer, optim.RAdam) and steps == 0)  # its first steps divide by nothing
    moved = [True, not adapts, steps > 0 or not adapts, True]
    assert (found.scale_D > 0).tolist() == moved
    assert float(found.unheard) == 1 - sum(moved) / 4


@pytest.mark.parametrize("make", ADAPTIVE[:5])
def test_a_square_that_underflows_is_no_silence(make: Any) -> None:
    """In float16 the square of 2e-4 is zero, and the optimizer moves the parameter all the same."""
    p = nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = make([p])
    p.grad = torch.tensor([2e-4, 0.0, 1.0], dtype=torch.float16)
    found = preconditioner(optimizer, p)
    assert (found.scale_D > 0).tolist() == [True, False, True]
    assert float(found.unheard) == pytest.approx(1 / 3)


def test_a_parameter_of_two_optimizers_is_counted_once() -> None:
    p = nn.Parameter(torch.ones(4))
    p.grad = torch.tensor([1.0, 0.0, 0.0, 3.0])
    optimizers = [optim.Adam([p]), optim.Adam([p])]
    assert float(read_preconditioner(optimizers, Layout(("p",), (p,)), [p.grad]).unheard) == 0.5


def test_an_optimizer_that_divides_by_nothing_hears_all() -> None:
    p = nn.Parameter(torch.ones(4))
    p.grad = torch.tensor([1.0, 0.0, 0.0, 3.0])
    found = preconditioner(optim.SGD([p], lr=0.1), p)
    assert found.scale_D.tolist() == pytest.approx([0.1] * 4)
    assert float(found.unheard) == 0


def test_a_unit_that_only_the_probe_makes_fire_is_no_edge() -> None:
    """The second unit has never fired in training. With eps for its p, rho would be five million."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.5], [-1.0, -1.0]]))
        model[2].weight.copy_(torch.tensor([[0.5, 1.0]]))
    optimizer, loss = optim.Adam(model.parameters(), lr=0.01), nn.MSELoss()
    x = torch.rand(6, 2, generator=torch.Generator().manual_seed(0)).double()
    batch, probe_batch = (x, x.sum(1, keepdim=True)), (torch.cat([x, -x]), torch.ones(12, 1).double())
    for _ in range(3):
        optimizer.zero_grad()
        loss(model(x), batch[1]).backward()
        optimizer.step()
    optimizer.zero_grad()
    loss(model(x), batch[1]).backward()
    heard_D = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]) != 0
    assert heard_D.tolist() == [True, True, False, False, True, False]
    instrument = PreconditionedSharpness(tol=1e-3)
    seen = (model, as_objective(loss), [optimizer], [batch])
    with Probe(*seen, held=HeldBatches([probe_batch])) as probe:
        view = View(probe, instrument.needs)
        values: Any = instrument.advance(view, instrument.init())[0]
        root_D = view.preconditioner.scale_D.sqrt()
    h_DD = dense_hessian(model, loss, probe_batch)
    dense = float(torch.linalg.eigvalsh(root_D[:, None] * h_DD * root_D)[-1]) / 2
    assert values["rho"] == pytest.approx(dense, rel=1e-3)
    assert 0 < dense < 1
    assert float(values["unheard"]) == 0.5
