"""Size of the outputs and what they predict, against sums over single predictions."""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import BY_NAME, CASES, Case, build
from torch import Tensor, nn

from instruments import Probe, Refusal, View
from instruments.network.output_scale import CLASSIFIER, OutputScale
from instruments.objective import as_objective


def read(model: nn.Module, loss: Any, batches: list[Any]) -> dict[str, float]:
    instrument = OutputScale()
    with Probe(model, as_objective(loss), [], batches) as probe:
        return {name: float(value) for name, value in instrument.read(View(probe, instrument.needs)).items()}  # type: ignore[arg-type]


def by_hand(rows: list[list[float]]) -> dict[str, float]:
    flat = [v for row in rows for v in row]
    mean = sum(flat) / len(flat)
    columns = list(zip(*rows, strict=True))
    centres = [sum(c) / len(c) for c in columns]
    variances = [sum((v - m) ** 2 for v in c) / (len(c) - 1) for c, m in zip(columns, centres, strict=True)]
    rms = math.sqrt(sum(v * v for v in flat) / len(flat))
    log_z = [math.log(sum(map(math.exp, row))) for row in rows]
    answers = [max(range(len(row)), key=row.__getitem__) for row in rows]
    shares = [answers.count(c) / len(rows) for c in range(len(columns))]
    return {
        "deviation": math.sqrt(sum((v - mean) ** 2 for v in flat) / len(flat)),
        "largest": max(map(abs, flat)),
        "between": math.sqrt(sum(variances) / len(variances)) / rms,
        "log_z": sum(log_z) / len(rows),
        "z_loss": sum(v * v for v in log_z) / len(rows),
        "prediction_entropy": -sum(p * math.log(p) for p in shares if p),
        "possible_entropy": math.log(min(len(rows), len(columns))),
        "probabilities": sum(min(r) >= 0 and abs(sum(r) - 1) < 1e-4 for r in rows) / len(rows),
    }


@pytest.mark.parametrize("case", [c for c in CASES if not c.random], ids=lambda case: case.name)
def test_statistics_of_the_outputs(case: Case) -> None:
    built = build(case)
    values = read(built.model, built.loss, [built.batch])
    mapping = isinstance(built.batch, dict)
    x, y = (built.batch["x"], built.batch["y"]) if mapping else built.batch
    with torch.no_grad():
        z = built.model(x)
    if z.ndim == 3:  # (N, C, T) and ignored positions
        z = torch.stack([z[n, :, t] for n in range(z.shape[0]) for t in range(z.shape[2]) if y[n, t] >= 0])
    expected = by_hand(z.tolist())
    if y.is_floating_point():
        assert all(math.isnan(values[name]) for name in CLASSIFIER)
        expected = {name: value for name, value in expected.items() if name not in CLASSIFIER}
    assert {name: values[name] for name in expected} == pytest.approx(expected)


class Fixed(nn.Module):
    """A model that gives its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Any) -> Any:
        return x * self.scale if isinstance(x, Tensor) else (x["loss"] * self.scale, x["z"])


def test_classes_in_the_last_dimension_are_understood() -> None:
    torch.manual_seed(0)
    z, y = torch.randn(4, 5, 3), torch.randint(0, 3, (4, 5))
    y[0, 0] = -100

    def losses(call: Any, batch: Any) -> Tensor:
        return call(batch[0] if isinstance(batch, tuple) else batch["z"]).mean((1, 2))

    rows = [z[n, t].tolist() for n in range(4) for t in range(5) if y[n, t] >= 0]
    for batch in ((z, y), {"z": z, "labels": y}):
        assert read(Fixed(), losses, [batch]) == pytest.approx(by_hand(rows), rel=1e-5)
    square, y3 = torch.randn(4, 3, 3), torch.randint(0, 3, (4, 3))
    pair = read(Fixed(), nn.CrossEntropyLoss(), [(square, y3)])  # as CrossEntropyLoss takes it: classes second
    assert pair == pytest.approx(by_hand(square.transpose(1, 2).flatten(0, 1).tolist()), rel=1e-5)
    named = read(Fixed(), losses, [{"z": square, "labels": y3}])  # in a mapping: classes last
    assert named == pytest.approx(by_hand(square.flatten(0, 1).tolist()), rel=1e-5)


def test_micro_batches_are_one_batch() -> None:
    built = build(BY_NAME["mlp"])
    x, y = built.batch
    whole = read(built.model, built.loss, [(x, y)])
    assert read(built.model, built.loss, [(x[:2], y[:2]), (x[2:], y[2:])]) == pytest.approx(whole)


def test_a_softmax_before_the_loss_and_a_constant_answer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Softmax(1))
    x, y = torch.randn(50, 4), torch.randint(0, 3, (50,))
    assert read(model, nn.CrossEntropyLoss(), [(x, y)])["probabilities"] == 1.0
    assert read(model[0], nn.CrossEntropyLoss(), [(x, y)])["probabilities"] == 0.0
    with torch.no_grad():
        model[0].weight.mul_(1e-4)  # type: ignore[operator,union-attr]
    values = read(model[0], nn.CrossEntropyLoss(), [(x, y)])
    assert values["prediction_entropy"] == 0.0
    assert values["between"] < 1e-2


def test_one_output_and_one_example() -> None:
    values = read(Fixed(), nn.MSELoss(), [(torch.tensor([-2.0]), torch.zeros(1))])
    assert (values["largest"], values["deviation"]) == (2.0, 0.0)
    assert math.isnan(values["between"])


def test_entropy_of_few_predictions_among_many_classes() -> None:
    values = read(Fixed(), nn.CrossEntropyLoss(), [(torch.eye(5)[:2], torch.tensor([0, 1]))])
    assert values["prediction_entropy"] == pytest.approx(math.log(2))
    assert values["possible_entropy"] == pytest.approx(math.log(2))


def test_nan_is_data() -> None:
    values = read(
        Fixed(), nn.CrossEntropyLoss(), [(torch.full((4, 3), float("nan")), torch.zeros(4, dtype=torch.long))]
    )
    assert math.isnan(values["deviation"])
    assert math.isnan(values["log_z"])


class Named(OrderedDict[str, Tensor]):
    """A mapping of a library's own, which torch does not know."""


@dataclass
class Held:
    """No mapping, and nothing that torch can look into."""

    z: Tensor


class Holding(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(2, 3), kind

    def forward(self, x: Tensor) -> Any:
        return self.kind(z=self.layer(x))


def test_outputs_in_a_container_are_looked_into_or_named() -> None:
    x = torch.randn(4, 2)
    model = Holding(Named)
    expected = read(model.layer, lambda call, batch: call(batch).sum(1), [x])
    assert read(model, lambda call, batch: call(batch)["z"].sum(1), [x]) == pytest.approx(expected, nan_ok=True)
    with pytest.raises(Refusal, match="tensors, got Held, which holds none that torch can see"):
        read(Holding(Held), lambda call, batch: call(batch).z.sum(1), [x])


def test_refusals() -> None:
    built = build(BY_NAME["residual"])
    with pytest.raises(Refusal, match="as a whole"):
        read(built.model, lambda call, batch: call.a(batch[0]).sum(1), [built.batch])
    batch = {"loss": torch.ones(()), "z": torch.ones(3, 2)}
    with pytest.raises(Refusal, match=r"first in what the model returns \(tuple\), got one number"):
        read(Fixed(), lambda call, batch: call(batch)[1].sum(1), [batch])
