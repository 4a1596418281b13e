"""Dead and saturated units against a search by hand, and what counts as a unit."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, build
from torch import Tensor, nn
from zoo import Recurrent, VisionTransformer

from instruments import Probe, Refusal, View
from instruments.network.dead_units import DeadUnits
from instruments.objective import as_objective

CE = nn.CrossEntropyLoss()


def read(model: nn.Module, x: Tensor, *, parts: int = 1, loss: Any = CE) -> tuple[dict[str, Any], list[str]]:
    y = torch.randint(0, 3, (len(x),), generator=torch.Generator().manual_seed(0))
    instrument = DeadUnits()
    batches = list(zip(x.chunk(parts), y.chunk(parts), strict=True))
    with Probe(model, as_objective(loss), [], batches) as probe:
        view = View(probe, instrument.needs)
        values = instrument.read(view)
    return dict(values), view.meter.provenance["modules"]


class Functional(nn.Module):
    """A convolutional network whose activations are functions, one of them behind a pool and one flattened."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.norm = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
        self.second, self.fc, self.out = nn.Conv2d(6, 4, 2), nn.Linear(16, 8), nn.Linear(8, 3)

    def rectify(self, x: Tensor) -> Tensor:
        match self.kind:
            case "relu":
                return F.relu(x)
            case "in place":
                return F.relu_(x + 0)
            case "relu6":
                return F.relu6(x)
            case "clamp":
                return x.clamp(min=0)
            case "clamp_min":
                return x.clamp_min(0.0)
        return F.threshold(x, 0.0, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.rectify(self.norm(self.conv(x)))
        h = self.rectify(F.max_pool2d(self.second(h), 1).flatten(1))
        return self.out(self.rectify(self.fc(h)))


@pytest.mark.parametrize("kind", ["relu", "in place", "relu6", "clamp", "clamp_min", "threshold"])
@pytest.mark.parametrize("parts", [1, 3])
def test_functional_activations_are_read(kind: str, parts: int) -> None:
    torch.manual_seed(1)
    model, x = Functional(kind).eval(), torch.randn(12, 1, 5, 5)
    with torch.no_grad():
        model.norm.bias[:2] = -50.0  # two dead channels
        model.fc.bias[3] = -50.0
        model.second.bias[0] = -3.0
        first = model.norm(model.conv(x)).clamp(min=0)
        second = model.second(first).clamp(min=0).flatten(1)
        third = model.fc(second).clamp(min=0)
    dead_1 = [all(v == 0 for v in first[:, c].flatten().tolist()) for c in range(6)]
    dead_2 = [all(v == 0 for v in second[:, j].tolist()) for j in range(16)]
    dead_3 = [all(v == 0 for v in third[:, j].tolist()) for j in range(8)]
    values, names = read(model, x, parts=parts)
    op = {"in place": "relu", "relu6": "hardtanh"}.get(kind, kind)
    assert names == [f"norm.{op}", f"second.{op}", f"fc.{op}"]
    assert values["dead_units"].tolist() == pytest.approx([sum(d) / len(d) for d in (dead_1, dead_2, dead_3)])
    assert dead_1[:2] == [True, True]
    assert any(dead_2)
    assert dead_3[3]
    assert float(values["dead"]) == pytest.approx(sum(dead_1 + dead_2 + dead_3) / 30)
    assert values["saturated_units"].isnan().all()
    assert math.isnan(values["saturated"])
    assert values["bound"] == pytest.approx(3 / 12, rel=0.15)


def test_one_activation_object_for_many_layers_is_told_apart() -> None:
    relu = nn.ReLU(inplace=True)
    model = nn.Sequential(nn.Linear(4, 8), relu, nn.Linear(8, 5), relu, nn.Linear(5, 3))
    with torch.no_grad():
        model[2].bias.fill_(-100)  # type: ignore[operator,union-attr]
    values, names = read(model, torch.randn(64, 4))
    assert names == ["0.relu", "2.relu"]
    assert values["dead_units"].tolist() == [0.0, 1.0]
    assert float(values["dead"]) == pytest.approx(5 / 13)


def test_saturation() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 10), nn.Tanh(), nn.Linear(10, 6), nn.Sigmoid(), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].weight.mul_(3)  # type: ignore[operator,union-attr]
        model[0].bias[:2] = torch.tensor([30.0, -30.0])  # type: ignore[index,union-attr]
        model[2].bias[0] = -30.0  # type: ignore[index,union-attr]
    x = torch.randn(16, 4)
    values, names = read(model, x)
    with torch.no_grad():
        tanh, sigmoid = model[:2](x), model[:4](x)
    beyond = [[abs(v) > 0.97 for v in row] for row in tanh.tolist()]
    outside = [[not 0.03 < v < 0.97 for v in row] for row in sigmoid.tolist()]
    assert names == ["0.tanh", "2.sigmoid"]
    assert values["saturation"].tolist() == pytest.approx(
        [sum(map(sum, t)) / (16 * len(t[0])) for t in (beyond, outside)]
    )
    always = [[all(column) for column in zip(*t, strict=True)] for t in (beyond, outside)]
    assert values["saturated_units"].tolist() == pytest.approx([sum(u) / len(u) for u in always])
    assert float(values["saturated"]) == pytest.approx(sum(map(sum, always)) / 16)
    assert sum(always[0]) >= 2
    assert values["dead_units"].isnan().all()
    assert math.isnan(values["dead"])


def test_units_of_a_transformer_are_those_of_its_linear_layer() -> None:
    torch.manual_seed(0)
    model = VisionTransformer()
    with torch.no_grad():
        model.encoder.layers[1].linear1.bias[:4] = -50.0
    for trained in (True, False):
        values, names = read(model.train(trained), torch.randn(6, 1, 6, 6))
        assert names == ["encoder.layers.0.linear1.relu", "encoder.layers.1.linear1.relu"]
        assert values["dead_units"].tolist() == [0.0, 4 / 16]


def test_channels_are_found_when_they_were_moved_last() -> None:
    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv2d(1, 5, 1), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.relu(self.conv(x).permute(0, 2, 3, 1)).mean((1, 2)))

    model = Moved()
    with torch.no_grad():
        model.conv.bias.copy_(torch.tensor([-50.0, 50, 50, 50, 50]))
    values, _ = read(model, torch.randn(6, 1, 4, 4))
    assert values["dead_units"].tolist() == [pytest.approx(0.2)]


def test_the_loss_is_not_part_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))

    def losses(call: Any, batch: Any) -> Tensor:
        return torch.tanh(call(batch[0])).sum(1) + nn.Sigmoid()(batch[0]).sum(1)

    _, names = read(model, torch.randn(6, 4), loss=losses)
    assert names == ["0.relu"]


def test_the_bound_covers_the_activity_of_a_unit_that_looks_dead() -> None:
    """A unit at the bound is silent on N examples with probability 5 %."""
    built = build(BY_NAME["in_place_relu"])
    values, _ = read(built.model, torch.randn(200, 4, dtype=torch.float64))
    assert (1 - values["bound"]) ** 200 == pytest.approx(0.05)
    assert values["bound"] == pytest.approx(3 / 200, rel=0.02)


def test_outputs_that_are_nan_are_not_known_to_be_stuck_or_not() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.Tanh()).double()
    x = torch.randn(4, 4, dtype=torch.float64)
    with torch.no_grad():
        model[2].bias[0] = torch.nan
    values, _ = read(model, x)
    assert values["dead_units"].isnan().tolist() == [False, True]
    assert math.isfinite(values["dead"])
    assert math.isnan(values["saturated"])
    assert values["saturated_units"].isnan().all()
    assert values["saturation"].isnan().all()
    x[0, 0] = torch.nan
    values, _ = read(model, x)
    assert math.isnan(values["dead"])
    assert values["dead_units"].isnan().all()


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3)), Recurrent(nn.GRU)])
def test_models_without_such_activations_are_refused(model: nn.Module) -> None:
    x = torch.randn(4, 4) if isinstance(model, nn.Sequential) else torch.randn(4, 3, 4)
    with pytest.raises(Refusal, match="can be dead or saturated"):
        read(model, x)
