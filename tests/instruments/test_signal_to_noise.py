"""Signal-to-noise ratio: its definition, its missing floor, its error bar."""

from typing import Any

import numpy as np
import pytest
import torch
from cases import BY_NAME, build
from taking import Mean, losses
from torch import nn
from twins import example_gradients

from instruments import Estimate, Probe, Refusal, View
from instruments.gradient._estimates import jackknife
from instruments.gradient.signal_to_noise import SignalToNoise
from instruments.objective import as_objective


def read(model: nn.Module, loss: Any, batch: Any) -> Any:
    instrument = SignalToNoise()
    with Probe(model, as_objective(loss), [], [batch]) as probe:
        return instrument.read(View(probe, instrument.needs))


@pytest.mark.parametrize("name", ["mlp", "layer_norm", "cnn", "recurrent"])
def test_ratios_follow_their_definition(name: str) -> None:
    built = build(BY_NAME[name])
    g_ND = example_gradients(built.model, built.loss, built.batch)
    values = read(built.model, built.loss, built.batch)
    n, variance_D = len(g_ND), g_ND.var(0)
    signal_D = g_ND.mean(0).square() - variance_D / n
    heard_D = variance_D > 1e-14
    assert float(values["aggregate"].value) == pytest.approx(float(signal_D.sum() / variance_D.sum()), rel=1e-9)
    median = float((signal_D[heard_D] / variance_D[heard_D]).median())
    assert float(values["median"]) == pytest.approx(median, rel=1e-6)
    assert float(values["silent"]) == pytest.approx(float((~heard_D).double().mean()), abs=1e-12)
    sizes = [p.numel() for p in built.model.parameters() if p.requires_grad]
    layers = [float(s.sum() / v.sum()) for s, v in zip(signal_D.split(sizes), variance_D.split(sizes), strict=True)]
    assert values["per_layer"].tolist() == pytest.approx(layers, rel=1e-7)


def test_the_error_bar_is_the_jackknife_over_examples() -> None:
    built = build(BY_NAME["mlp"])
    g_ND = example_gradients(built.model, built.loss, built.batch)

    def aggregate(rows: torch.Tensor) -> float:
        variance = rows.var(0).sum()
        return float((rows.mean(0).square().sum() - variance / len(rows)) / variance)

    n = len(g_ND)
    left_out = np.array([aggregate(torch.cat([g_ND[:i], g_ND[i + 1 :]])) for i in range(n)])
    expected = np.sqrt((n - 1) / n * np.square(left_out - left_out.mean()).sum())
    found = read(built.model, built.loss, built.batch)["aggregate"]
    assert isinstance(found, Estimate)
    assert float(found.stderr) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("n", [8, 16])
def test_no_floor_without_signal(n: int) -> None:
    """The plug-in estimate has mean 1/(n - 3) on pure noise (variance over n); ours has none."""
    generator = torch.Generator().manual_seed(0)
    size, plugin, ours = 4000, [], []
    for _ in range(30):
        x = torch.randn(n, size, generator=generator, dtype=torch.float64)
        plugin.append(float((x.mean(0).square() / x.var(0, unbiased=False)).mean()))
        ours.append(float(read(Mean(size), losses, x)["aggregate"].value))
    assert np.mean(plugin) == pytest.approx(1 / (n - 3), rel=0.03)
    assert abs(np.mean(ours)) < 4 * np.std(ours) / np.sqrt(len(ours))
    assert abs(np.mean(ours)) < 0.05 / n


def test_error_bars_mean_what_they_say() -> None:
    """Against the true ratio of a Gaussian problem: about 95 % of the readings are within two standard errors."""
    generator = torch.Generator().manual_seed(1)
    truth, inside, size, n = 0.25, 0, 50, 64
    for _ in range(200):
        x = 0.5 + torch.randn(n, size, generator=generator, dtype=torch.float64)
        found = read(Mean(size), losses, x)["aggregate"]
        inside += abs(float(found.value) - truth) < 2 * float(found.stderr)
    assert 180 <= inside <= 199


def test_dead_coordinates_are_counted_and_left_out() -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, :3] = 2.0
    values = read(Mean(6), losses, x)
    assert float(values["silent"]) == 0.5
    assert np.isfinite(float(values["median"]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_known(bad: float) -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[2, :3] = bad
    values = read(Mean(6), losses, x)
    assert np.isnan([float(values["aggregate"].value), float(values["median"]), float(values["silent"])]).all()


def test_one_example_has_no_variance() -> None:
    with pytest.raises(Refusal, match="at least 2 examples"):
        read(Mean(3), losses, torch.ones(1, 3, dtype=torch.float64))


def test_an_error_is_infinite_where_an_example_left_out_makes_the_estimate_infinite() -> None:
    values = np.linspace(1, 2, 8)
    assert jackknife(values) == pytest.approx(np.sqrt(7 / 8 * np.square(values - values.mean()).sum()))
    assert jackknife(np.append(values, np.inf)) == np.inf


def test_a_parameter_without_elements_is_no_obstacle() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    batch = torch.randn(8, 3), torch.randint(2, (8,))
    plain = read(model, nn.CrossEntropyLoss(), batch)
    model.register_parameter("nothing", nn.Parameter(torch.zeros(0)))
    values = read(model, nn.CrossEntropyLoss(), batch)
    assert float(values["median"]) == pytest.approx(float(plain["median"]))
