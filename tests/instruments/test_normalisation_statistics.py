"""Running against batch statistics, channel by channel, with a repair and its opposite."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from instruments import Probe, Refusal, View
from instruments.network.normalisation_statistics import NormalisationStatistics
from instruments.objective import as_objective


def read(model: nn.Module, batches: list[Any], loss: Any = None) -> tuple[dict[str, Any], list[str]]:
    instrument = NormalisationStatistics()
    with Probe(model, as_objective(loss or nn.MSELoss()), [], batches) as probe:
        view = View(probe, instrument.needs)
        values = instrument.read(view)
    return dict(values), view.meter.provenance["modules"]


def network() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 6), nn.BatchNorm1d(6)
    )
    for m in (model[1], model[5]):
        assert isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)
        assert m.running_mean is not None
        assert m.running_var is not None
        m.running_mean.normal_(std=0.3)
        m.running_var.uniform_(0.05, 2.0)
    return model, torch.randn(16, 1, 5, 5), torch.randn(16, 6)


def by_hand(model: nn.Sequential, at: int, x: Tensor) -> dict[str, float]:
    copied, seen = copy.deepcopy(model), []
    copied[at].register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
    with torch.no_grad():
        copied(x)
    h = seen[0]
    m = model[at]
    distances, ratios = [], []
    for c in range(h.shape[1]):
        values = h[:, c].flatten().tolist()
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
        distances.append(abs(float(m.running_mean[c]) - mean) / math.sqrt(variance))  # type: ignore[index,union-attr]
        ratios.append(float(m.running_var[c]) / variance)  # type: ignore[index,union-attr]
    shifted, rescaled = [d > 0.2 for d in distances], [not 0.7 <= r <= 1.4 for r in ratios]
    n = len(distances)
    return {
        "distance": math.sqrt(sum(d * d for d in distances) / n),
        "variance_ratio": sum(sorted(ratios)[n // 2 - 1 : n // 2 + 1]) / 2,
        "shifted": sum(shifted) / n,
        "rescaled": sum(rescaled) / n,
        "off": sum(a or b for a, b in zip(shifted, rescaled, strict=True)),
    }


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
def test_every_channel_against_sums_by_hand(trained: bool, parts: int) -> None:
    model, x, y = network()
    model.train(trained)
    if trained and parts == 2:
        model[1].eval()  # what the second layer sees must not depend on the micro-batch
    values, names = read(model, list(zip(x.chunk(parts), y.chunk(parts), strict=True)))
    assert names == ["1", "5"]
    hand = [by_hand(model, at, x) for at in (1, 5)]
    for name in ("distance", "variance_ratio", "shifted", "rescaled"):
        assert values[name].tolist() == pytest.approx([h[name] for h in hand], rel=1e-4), name
    assert float(values["off"]) == pytest.approx(sum(h["off"] for h in hand) / 10)
    assert float(values["noise"]) == pytest.approx(1 / math.sqrt(16))


def test_statistics_are_left_as_they_were() -> None:
    model, x, y = network()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    read(model, [(x, y)])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_exact_statistics_are_not_off_and_the_distance_is_the_noise() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4000), nn.Linear(4000, 1))  # running mean 0 and variance 1: the truth
    values, _ = read(model, [(torch.randn(100, 4000), torch.randn(100, 1))])
    assert values["distance"].tolist() == [pytest.approx(float(values["noise"]), rel=0.05)]
    assert values["variance_ratio"].tolist() == [pytest.approx(1, abs=0.02)]
    assert float(values["off"]) < 0.1
    with torch.no_grad():
        model[0].running_mean += 1  # type: ignore[operator]
    assert float(read(model, [(torch.randn(100, 4000), torch.randn(100, 1))])[0]["off"]) == 1.0


def test_large_means_lose_no_digits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(1, affine=False), nn.Linear(1, 1))
    x = torch.randn(1000, 1) + 1e4
    model[0].running_mean.fill_(1e4)  # type: ignore[operator,union-attr]
    values, _ = read(model, [(x, x)])
    assert values["variance_ratio"].tolist() == [pytest.approx(1 / float(x.double().var()), rel=1e-3)]


def test_a_constant_channel_and_nan_are_off() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    x = torch.randn(8, 2)
    x[:, 0] = 3.0
    values, _ = read(model, [(x, x[:, :1])])
    assert values["rescaled"][0] >= 0.5
    x[:, 0] = float("nan")
    values, _ = read(model, [(x, x[:, :1])])
    assert values["shifted"][0] >= 0.5
    assert not math.isnan(float(values["off"]))


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(4, track_running_stats=False), nn.LayerNorm(4), nn.Identity()], ids=repr
)
def test_models_without_running_statistics_are_refused(norm: nn.Module) -> None:
    with pytest.raises(Refusal, match="no batch normalisation"):
        read(nn.Sequential(norm, nn.Linear(4, 1)), [(torch.randn(8, 4), torch.randn(8, 1))])
