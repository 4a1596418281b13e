"""Weight norm, update ratio and the smallest eigenvalue against their definitions, on every case."""

from typing import Any

import pytest
import torch
from cases import CASES, Case, build
from torch import nn
from twins import dense_hessian, trainable

from instruments import Probe, Refusal, View
from instruments.curvature.smallest import Smallest
from instruments.held import HeldBatches
from instruments.network.weight_norm import WeightNorm
from instruments.objective import as_objective
from instruments.step.update_ratio import UpdateRatio

SMOOTH = [case for case in CASES if not case.random and case.name != "in_place_relu"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_norms_of_weights_and_steps(case: Case) -> None:
    built = build(case)
    params = list(trainable(built.model).values())
    before = [p.detach().clone() for p in params]
    probe = Probe(built.model, as_objective(built.loss), [], [built.batch])
    probe.remember()
    with torch.no_grad():
        for i, p in enumerate(params):
            p.mul_(0.9).add_(0.01 * i)
    with probe:
        weights = WeightNorm().read(View(probe, WeightNorm.needs))
        ratio = UpdateRatio().read(View(probe, UpdateRatio.needs))
    sizes, sizes_before = [float(p.detach().norm()) for p in params], [float(p0.norm()) for p0 in before]
    steps = [float((p.detach() - p0).norm()) for p, p0 in zip(params, before, strict=True)]
    assert float(weights["weight_norm"]) == pytest.approx(sum(s**2 for s in sizes) ** 0.5)
    assert weights["per_layer"].tolist() == pytest.approx(sizes)
    assert float(ratio["update_norm"]) == pytest.approx(sum(s**2 for s in steps) ** 0.5)
    length_before = sum(s**2 for s in sizes_before) ** 0.5
    assert float(ratio["update_ratio"]) == pytest.approx(float(ratio["update_norm"]) / length_before)
    expected = [u / w if w else float("inf") for u, w in zip(steps, sizes_before, strict=True)]
    assert ratio["per_layer"].tolist() == pytest.approx(expected)


def test_tensors_that_were_zero() -> None:
    model = nn.Linear(2, 2)
    nn.init.zeros_(model.bias)
    nn.init.zeros_(model.weight)
    probe = Probe(model, as_objective(nn.MSELoss()), [], [(torch.ones(1, 2), torch.ones(1, 2))])
    probe.remember()
    with torch.no_grad():
        model.bias.add_(1)
    with probe:
        per_layer = UpdateRatio().read(View(probe, UpdateRatio.needs))["per_layer"]
    assert torch.isnan(per_layer[0])
    assert torch.isinf(per_layer[1])


def test_a_step_that_throws_the_weights_away_is_as_long_as_it_is() -> None:
    """Over the length of the new weights it would be 1 however long."""
    model, x = nn.Linear(2, 2, bias=False), torch.ones(1, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e6)
    before = model.weight.detach().clone()
    model(x).sum().backward()
    probe = Probe(model, as_objective(nn.MSELoss()), [optimizer], [(x, x)])
    probe.remember()
    optimizer.step()
    with probe:
        ratio = UpdateRatio().read(View(probe, UpdateRatio.needs))["update_ratio"]
    assert float(ratio) == pytest.approx(2e6 / float(before.norm()), rel=1e-5)


def test_the_update_needs_the_parameters_before() -> None:
    model = nn.Linear(2, 2)
    probe = Probe(model, as_objective(nn.MSELoss()), [], [(torch.ones(1, 2), torch.ones(1, 2))])
    with probe, pytest.raises(Refusal, match="before the step"):
        UpdateRatio().read(View(probe, UpdateRatio.needs))


@pytest.mark.parametrize("case", SMOOTH, ids=lambda case: case.name)
def test_smallest_eigenvalue(case: Case) -> None:
    built = build(case)
    eigenvalues = torch.linalg.eigvalsh(dense_hessian(built.model, built.loss, built.batch))
    instrument = Smallest(tol=1e-3, max_products=200)
    probe = Probe(built.model, as_objective(built.loss), [], [built.batch], held=HeldBatches([built.batch]))
    with probe:
        values: Any = instrument.advance(View(probe, instrument.needs), instrument.init())[0]
    scale = float(eigenvalues.abs().max())
    assert values["smallest"] == pytest.approx(float(eigenvalues[0]), rel=5e-3, abs=1e-6 * scale)
    assert values["smallest"] >= float(eigenvalues[0]) - 1e-7 * scale
