"""CABS: its definition over groups, the step size it takes for SGD with momentum, and whom it refuses."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import Built
from taking import case, mean_of, sizes, take
from torch import Tensor, nn, optim
from twins import example_gradients, trainable

from instruments import Refusal
from instruments.gradient.noise_scale import NoiseScale
from instruments.gradient.suggested_batch import SuggestedBatch, effective_rate


def two_groups(built: Built) -> optim.SGD:
    """The last tensor learns five times as fast, the first one not at all."""
    params = list(trainable(built.model).values())
    return optim.SGD([{"params": params[1:-1]}, {"params": params[-1:], "lr": 0.5}], lr=0.1)


@pytest.mark.parametrize("name", ["mlp", "mlp_sum", "cnn", "recurrent", "frozen", "called_twice_unused"])
def test_it_follows_its_definition(name: str) -> None:
    built = case(name)
    g_ND = example_gradients(built.model, built.loss, built.batch)
    x, y = built.batch
    rate_D = torch.full((g_ND.shape[1],), 0.1, dtype=torch.float64)
    rate_D[: sizes(built)[0]], rate_D[-sizes(built)[-1] :] = 0.0, 0.5
    alone = nn.functional.cross_entropy(built.model(x), y, reduction="none").tolist()
    unit = len(x) if name == "mlp_sum" else 1

    def suggested(rows: Tensor, losses: list[float]) -> float:
        return float((rate_D * rows.var(0)).sum()) / (unit * sum(losses) / len(losses) - 0.1)

    values, _, facts = take(SuggestedBatch(minimum=0.1), built, [two_groups(built)])
    assert float(values["suggested_batch"].value) == pytest.approx(suggested(g_ND, alone), rel=1e-8)
    n = len(g_ND)
    left = np.array([suggested(g_ND[torch.arange(n) != i], alone[:i] + alone[i + 1 :]) for i in range(n)])
    expected = np.sqrt((n - 1) / n * np.square(left - left.mean()).sum())
    assert float(values["suggested_batch"].stderr) == pytest.approx(expected, rel=1e-6)
    assert values["effective_rate"].tolist() == pytest.approx([0.1, 0.5])
    assert facts["step_size"] == "lr"


def test_where_its_assumptions_hold_it_is_twice_the_noise_scale() -> None:
    """loss_i = 1/2 |theta - x_i|^2 has curvature 1 everywhere and the least value tr(Sigma)/2: eta = 1."""
    x = torch.randn(4096, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    built = mean_of(x)
    optimizer = optim.SGD(built.model.parameters(), lr=1.0)
    noise = take(NoiseScale(), built)[0]["noise_scale"].value
    found = take(SuggestedBatch(minimum=10.0), built, [optimizer])[0]["suggested_batch"]
    assert float(found.value) == pytest.approx(2 * noise, rel=0.02)
    assert abs(float(found.value) - 2.0) < 3 * float(found.stderr)


@pytest.mark.parametrize(
    "settings",
    [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.8, "dampening": 0.5}],
    ids=str,
)
def test_the_effective_rate_is_how_far_a_constant_gradient_drives(settings: dict[str, Any]) -> None:
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = optim.SGD([p], lr=0.01, **settings)
    for _ in range(300):
        p.grad = torch.ones_like(p)
        before = float(p.detach())
        optimizer.step()
    assert before - float(p.detach()) == pytest.approx(effective_rate(optimizer, optimizer.param_groups[0]), rel=1e-9)


def test_momentum_is_corrected_for_and_said() -> None:
    built = case("mlp")
    plain, _, _ = take(SuggestedBatch(), built, [optim.SGD(built.model.parameters(), lr=0.1)])
    heavy, _, facts = take(SuggestedBatch(), built, [optim.SGD(built.model.parameters(), lr=0.1, momentum=0.9)])
    assert float(heavy["suggested_batch"].value) == pytest.approx(10 * float(plain["suggested_batch"].value))
    assert "momentum" in facts["step_size"]


class Other(optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Something else."""


Make = Callable[[Any], optim.Optimizer]
REFUSED: list[tuple[Make, str]] = [
    (lambda params: optim.Adam(params), "got Adam"),
    (lambda params: Other(params), "got Other"),
    (lambda params: optim.SGD(params, maximize=True), "maximizes"),
    (lambda params: optim.SGD(params, momentum=1.0), "without end"),
    (lambda params: optim.SGD([nn.Parameter(torch.ones(1))]), "no optimizer"),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_whom_it_refuses(make: Make, reason: str) -> None:
    built = case("mlp")
    with pytest.raises(Refusal, match=reason):
        take(SuggestedBatch(), built, [make(built.model.parameters())])


def test_a_loss_below_its_minimum_is_refused_and_nan_is_not() -> None:
    built = mean_of(torch.ones(4, 2, dtype=torch.float64))
    sgd = optim.SGD(built.model.parameters(), lr=1.0)
    with pytest.raises(Refusal, match="minimum of 5, got 1"):
        take(SuggestedBatch(minimum=5.0), built, [sgd])
    broken = mean_of(torch.full((4, 2), torch.nan, dtype=torch.float64))
    values, _, _ = take(SuggestedBatch(), broken, [optim.SGD(broken.model.parameters(), lr=1.0)])
    assert np.isnan(float(values["suggested_batch"].value))
    pair = mean_of(torch.tensor([[1.0], [3.0]], dtype=torch.float64))
    values, _, _ = take(SuggestedBatch(), pair, [optim.SGD(pair.model.parameters(), lr=1.0)])
    assert float(values["suggested_batch"].value) == pytest.approx(2 / 2.5)
    assert np.isnan(float(values["suggested_batch"].stderr))
