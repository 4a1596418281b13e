"""Ranks of features against singular values, and where the features are taken from."""

import math
from typing import Any

import pytest
import torch
from cases import BY_NAME, CASES, Case, build
from torch import Tensor, nn

from instruments import Probe, Refusal, View
from instruments.network.effective_rank import EffectiveRank, ranks
from instruments.objective import as_objective


def read(
    model: nn.Module, loss: Any, batches: list[Any], instrument: EffectiveRank | None = None
) -> tuple[dict[str, float], dict[str, Any]]:
    instrument = instrument or EffectiveRank()
    with Probe(model, as_objective(loss), [], batches) as probe:
        view = View(probe, instrument.needs)
        values = {name: float(value) for name, value in instrument.read(view).items()}  # type: ignore[arg-type]
    return values, view.meter.provenance


def by_singular_values(a: Tensor) -> tuple[float, float]:
    s = torch.linalg.svdvals(a.double()).tolist()
    p = [v / sum(s) for v in s if v > 0]
    return math.exp(-sum(v * math.log(v) for v in p)), sum(v * v for v in s) / max(s) ** 2


def inputs_of_last_linear(model: nn.Module, x: Any) -> tuple[str, Tensor]:
    seen: dict[str, Tensor] = {}
    handles = [
        m.register_forward_pre_hook(lambda _m, args, name=name: seen.update({name: args[0]}))
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear)
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    name = list(seen)[-1]
    return name or "model", seen[name].flatten(0, -2)


WITH_LINEAR = [c for c in CASES if c.name not in ("bare_parameters", "mlp_custom") and not c.random]


@pytest.mark.parametrize("case", WITH_LINEAR, ids=lambda case: case.name)
def test_the_last_linear_layer_is_read(case: Case) -> None:
    built = build(case)
    name, a = inputs_of_last_linear(built.model, built.batch[0])
    values, facts = read(built.model, built.loss, [built.batch])
    effective, stable = by_singular_values(a)
    assert facts["layer"] == name
    assert facts["rows"] == len(a)
    # squares of singular values lose half of the digits of those that are zero
    assert values["effective_rank"] == pytest.approx(effective, rel=1e-5)
    assert values["stable_rank"] == pytest.approx(stable, rel=1e-9)
    assert values["possible"] == min(a.shape)
    assert 1 - 1e-9 <= values["stable_rank"] <= min(a.shape)
    assert 1 - 1e-9 <= values["effective_rank"] <= min(a.shape) + 1e-9


@pytest.mark.parametrize("shape", [(30, 5), (5, 30), (7, 7), (1, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_are_those_of_the_singular_values(shape: tuple[int, int], seed: int) -> None:
    a = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = [float(v) for v in ranks(a)]
    assert found == pytest.approx(by_singular_values(a), rel=1e-8)
    assert [float(v) for v in ranks(3 * a)] == pytest.approx(found, rel=1e-8)


def test_known_ranks() -> None:
    assert [float(v) for v in ranks(torch.eye(6, dtype=torch.float64))] == pytest.approx([6, 6])
    one = torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 4)).double()
    assert [float(v) for v in ranks(one)] == pytest.approx([1, 1], abs=1e-6)
    assert all(math.isnan(v) for v in ranks(torch.zeros(3, 3, dtype=torch.float64)))
    assert all(math.isnan(v) for v in ranks(torch.full((3, 3), float("nan"), dtype=torch.float64)))


def test_a_layer_by_its_name() -> None:
    built = build(BY_NAME["cnn"])
    x = built.batch[0]
    with torch.no_grad():
        hidden = built.model[:2](x)  # type: ignore[index]
    values, facts = read(built.model, built.loss, [built.batch], EffectiveRank(layer="2"))
    columns = torch.stack([hidden[:, c].flatten() for c in range(hidden.shape[1])], 1)
    assert facts["layer"] == "2"
    assert values["effective_rank"] == pytest.approx(by_singular_values(columns)[0], rel=1e-6)
    first = read(built.model, built.loss, [built.batch], EffectiveRank(layer="[0-3]"))[1]
    assert first["layer"] == "3"  # of several that match the one called last


def test_rows_are_bounded_and_spread() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(100, 4)
    values, facts = read(model, nn.MSELoss(), [(x, torch.randn(100, 3))], EffectiveRank(rows=3))
    assert facts["rows"] == 3
    assert values["effective_rank"] == pytest.approx(by_singular_values(x[[0, 49, 99]])[0], rel=1e-6)


def test_micro_batches_and_calls_are_pooled() -> None:
    built = build(BY_NAME["mlp"])
    x, y = built.batch
    whole = read(built.model, built.loss, [(x, y)])[0]
    parts = read(built.model, built.loss, [(x[:2], y[:2]), (x[2:], y[2:])])[0]
    assert parts == pytest.approx(whole)


class ThereAndBack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(torch.tanh(self.b(torch.tanh(self.a(x)))))


def test_the_layer_called_last_counts_with_all_its_calls() -> None:
    torch.manual_seed(0)
    model, x = ThereAndBack(), torch.randn(7, 4)
    _, facts = read(model, nn.MSELoss(), [(x, x)])
    assert facts["layer"] == "a"
    assert facts["rows"] == 14


def test_centred() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 4) + 100
    model, batch = nn.Linear(4, 3), (x, torch.randn(50, 3))
    assert read(model, nn.MSELoss(), [batch])[0]["stable_rank"] == pytest.approx(1, abs=1e-3)
    centred = read(model, nn.MSELoss(), [batch], EffectiveRank(centred=True))[0]
    assert centred["stable_rank"] == pytest.approx(by_singular_values(x - x.mean(0))[1], rel=1e-4)
    assert centred["stable_rank"] > 2


def test_refusals() -> None:
    built = build(BY_NAME["bare_parameters"])
    with pytest.raises(Refusal, match="Linear"):
        read(built.model, built.loss, [built.batch])
    built = build(BY_NAME["mlp"])
    with pytest.raises(Refusal, match="'head'"):
        read(built.model, built.loss, [built.batch], EffectiveRank(layer="head"))
    with pytest.raises(ValueError, match="rows >= 2"):
        EffectiveRank(rows=1)
