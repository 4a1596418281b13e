"""Norms over depth: the fit against NumPy's, planted trends, and networks that do what theory says."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases import Built
from taking import SOME, case, take
from torch import nn
from twins import total_loss, trainable

from instruments import Refusal
from instruments.gradient.layer_profile import LayerProfile


@pytest.mark.parametrize("name", [name for name in SOME if name != "frozen"])
def test_it_is_the_least_squares_line_of_numpy(name: str) -> None:
    built = case(name)
    params = list(trainable(built.model).values())
    norms = [0.0 if p.grad is None else float(p.grad.norm()) for p in params]
    values, _, _ = take(LayerProfile(), built)
    assert values["per_layer"].tolist() == pytest.approx(norms)
    weights = [norm for p, norm in zip(params, norms, strict=True) if p.dim() > 1]
    depth = np.arange(len(weights))[::-1]
    assert values["first_over_last"] == pytest.approx(weights[0] / weights[-1])
    if len(weights) > 3:
        (slope, _), covariance = np.polyfit(depth, np.log(weights), 1, cov=True)
        assert values["slope"].stderr == pytest.approx(np.sqrt(covariance[0, 0]))
    else:
        slope = np.polyfit(depth, np.log(weights), 1)[0]
    assert values["slope"].value == pytest.approx(slope)
    if len(weights) > 2:
        assert values["r_squared"] == pytest.approx(np.corrcoef(depth, np.log(weights))[0, 1] ** 2)


def stack(depth: int, activation: Callable[[], nn.Module], gain: float | None = None) -> Built:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layer = nn.Linear(32, 32, dtype=torch.float64)
        if gain is not None:
            nn.init.normal_(layer.weight, std=gain / 32**0.5)
        layers += [layer, activation()]
    batch = torch.randn(64, 32, dtype=torch.float64), torch.randn(64, 32, dtype=torch.float64)
    built = Built(nn.Sequential(*layers), nn.MSELoss(), batch)
    total_loss(built.model, built.loss, built.batch).backward()
    return built


def test_sigmoid_layers_vanish_large_gains_explode_and_tanh_keeps_its_scale() -> None:
    """A layer multiplies the gradient by at most a quarter (sigmoid), and by about its gain where it is linear."""
    vanishing, _, _ = take(LayerProfile(), stack(10, nn.Sigmoid))
    assert vanishing["slope"].value < -0.5
    assert vanishing["r_squared"] > 0.8
    assert vanishing["first_over_last"] < 1e-3
    exploding, _, _ = take(LayerProfile(), stack(10, nn.Hardtanh, gain=4.0))
    assert exploding["slope"].value > 0.5
    assert exploding["first_over_last"] > 70
    healthy, _, _ = take(LayerProfile(), stack(10, nn.Tanh, gain=1.0))
    assert abs(healthy["slope"].value) < 0.2


def planted(norms: list[float]) -> Built:
    """Weights with gradients of these norms, each with a bias whose gradient must not matter."""
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in norms))
    for layer, norm in zip(model, norms, strict=True):
        layer.weight.grad, layer.bias.grad = torch.full((2, 2), norm / 2), torch.full((2,), 1e6)
    return Built(model, nn.MSELoss(), (torch.zeros(1, 2), torch.zeros(1, 2)))


def test_a_geometric_trend_is_found_exactly() -> None:
    values, _, _ = take(LayerProfile(), planted([0.001, 0.01, 0.1, 1.0]))
    assert values["slope"].value == pytest.approx(-np.log(10))
    assert values["slope"].stderr == pytest.approx(0, abs=1e-6)
    assert values["r_squared"] == pytest.approx(1)
    assert values["first_over_last"] == pytest.approx(1e-3)
    assert values["silent"] == 0


def test_layers_without_a_gradient_are_counted_and_left_out() -> None:
    built = planted([0.0, 0.01, 1.0, 1.0])
    built.model[2].weight.grad = None
    values, _, _ = take(LayerProfile(), built)
    assert values["silent"] == 2
    assert values["slope"].value == pytest.approx(-np.log(100) / 2)  # two layers apart
    assert np.isnan(values["slope"].stderr)
    assert values["first_over_last"] == 0
    nothing, _, _ = take(LayerProfile(), planted([0.0, 0.0]))
    assert np.isnan([nothing["slope"].value, nothing["r_squared"], nothing["first_over_last"]]).all()
    assert nothing["silent"] == 2


def test_what_is_not_finite_is_data() -> None:
    values, _, _ = take(LayerProfile(), planted([1.0, np.nan, 1.0]))
    assert np.isnan(values["slope"].value)
    assert np.isnan(values["per_layer"][2])
    assert values["silent"] == 0
    assert take(LayerProfile(), planted([np.inf, 1.0]))[0]["first_over_last"] == np.inf


def test_equal_norms_have_no_trend_and_nothing_to_explain() -> None:
    values, _, _ = take(LayerProfile(), planted([1.0, 1.0, 1.0]))
    assert values["slope"].value == 0
    assert np.isnan(values["r_squared"])


def test_sparse_gradients_count() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 3, sparse=True), nn.Flatten(), nn.Linear(6, 2))
    model(torch.tensor([[1, 1], [2, 3]])).square().sum().backward()
    values, _, _ = take(LayerProfile(), Built(model, nn.MSELoss(), (torch.zeros(1), torch.zeros(1))))
    assert values["per_layer"][0] == pytest.approx(float(model[0].weight.grad.to_dense().norm()))


def test_one_weight_matrix_or_no_gradient_is_refused() -> None:
    with pytest.raises(Refusal, match="two weight matrices, got 1"):
        take(LayerProfile(), case("frozen"))
    built = planted([1.0, 1.0])
    built.model.zero_grad()
    with pytest.raises(Refusal, match="no parameter has a gradient"):
        take(LayerProfile(), built)
