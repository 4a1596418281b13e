"""Distance from the start against plain sums, across a checkpoint and a change of the model."""

import io
import math
from typing import Any

import pytest
import torch
from cases import CASES, Case, build
from torch import nn
from twins import trainable

from instruments import Probe, View
from instruments.instrument import State
from instruments.objective import as_objective
from instruments.step.distance import Distance


def read(model: nn.Module, state: State) -> tuple[dict[str, Any], State]:
    with Probe(model, as_objective(nn.MSELoss()), [], [(torch.ones(1), torch.ones(1))]) as probe:
        values, state = Distance().advance(View(probe, Distance.needs), state)
    return dict(values), state


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_distance_from_the_first_reading(case: Case) -> None:
    model = build(case).model
    params = list(trainable(model).values())
    start = [p.detach().clone() for p in params]
    values, state = read(model, Distance().init())
    assert float(values["distance"]) == 0
    assert float(values["relative"]) == 0
    with torch.no_grad():
        for i, p in enumerate(params):
            p.mul_(0.5).add_(0.1 * (i + 1))
    values, state = read(model, state)
    moved = [sum((float(a) - float(b)) ** 2 for a, b in zip(p.detach().flatten(), p0.flatten(), strict=True)) ** 0.5
             for p, p0 in zip(params, start, strict=True)]  # fmt: skip
    sizes = [sum(float(a) ** 2 for a in p0.flatten()) ** 0.5 for p0 in start]
    assert values["per_layer"].tolist() == pytest.approx(moved)
    assert float(values["distance"]) == pytest.approx(math.hypot(*moved))
    assert float(values["relative"]) == pytest.approx(math.hypot(*moved) / math.hypot(*sizes))
    expected = [m / s if s else math.inf for m, s in zip(moved, sizes, strict=True)]
    assert values["relative_per_layer"].tolist() == pytest.approx(expected)


def test_the_start_goes_through_a_checkpoint() -> None:
    model = nn.Linear(3, 2)
    _, state = read(model, Distance().init())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    with torch.no_grad():
        model.weight.add_(1)
    values, _ = read(model, loaded)
    assert float(values["distance"]) == pytest.approx(6**0.5)


def test_the_memory_does_not_follow_the_parameters() -> None:
    model = nn.Linear(3, 2)
    _, state = read(model, Distance().init())
    assert all(kept.data_ptr() != p.data_ptr() for kept, p in zip(state["start"], model.parameters(), strict=True))
    _, again = read(model, state)
    assert again is state


def test_other_parameters_start_anew() -> None:
    _, state = read(nn.Linear(3, 2), Distance().init())
    values, state = read(nn.Linear(3, 4), state)
    assert float(values["distance"]) == 0
    values, state = read(nn.Sequential(nn.Linear(3, 4)), state)
    assert float(values["distance"]) == 0
    assert state["names"] == ["0.weight", "0.bias"]


def test_not_finite_parameters_are_data() -> None:
    model = nn.Linear(3, 2)
    _, state = read(model, Distance().init())
    with torch.no_grad():
        model.bias[0] = math.nan
    values, _ = read(model, state)
    assert math.isnan(values["distance"])
    assert float(values["per_layer"][0]) == 0
