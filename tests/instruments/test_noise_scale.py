"""Noise scale and norm test: identities, ground truth, and error bars that mean what they say."""

from typing import Any

import numpy as np
import pytest
import torch
from cases import BY_NAME, build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from twins import example_gradients

from instruments import Estimate, Probe, Refusal, View
from instruments.gradient.noise_scale import NoiseScale, pooled_ratio
from instruments.objective import as_objective


class Mean(nn.Module):
    """loss_i = 1/2 |theta - x_i|^2: gradient theta - x_i, covariance that of x."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.theta - x).square().sum(1) / 2


def read(model: nn.Module, loss: Any, batches: list[Any], state: Any = None) -> Any:
    instrument = NoiseScale()
    with Probe(model, as_objective(loss), [], batches) as probe:
        return instrument.advance(View(probe, instrument.needs), state or instrument.init())


def losses(call: Any, x: Any) -> torch.Tensor:
    return call(x)


def test_moments_follow_their_definitions() -> None:
    built = build(BY_NAME["mlp"])
    g = example_gradients(built.model, built.loss, built.batch)
    values, _ = read(built.model, built.loss, [built.batch])
    a, q, n = float(g.square().sum()), float(g.sum(0).square().sum()), len(g)
    assert values["sum_of_squared_norms"] == pytest.approx(a, rel=1e-12)
    assert values["squared_norm_of_sum"] == pytest.approx(q, rel=1e-12)
    trace = float(g.var(0).sum())
    assert values["trace_of_covariance"] == pytest.approx(trace, rel=1e-12)
    assert values["squared_gradient"] == pytest.approx(q / n**2 - trace / n, rel=1e-10)
    assert values["norm_test"] == pytest.approx(trace / (n * q / n**2), rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.integers(1, 8), st.integers(0, 10_000), st.floats(1e-3, 1e3))
def test_norm_test_and_coherence_are_one_number(n: int, size: int, seed: int, scale: float) -> None:
    """Q/A = N / (1 + (N - 1) theta^2): the m-coherence follows from the norm test."""
    x = scale * torch.randn(n, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1
    values, _ = read(Mean(size), losses, [x])
    coherence = values["squared_norm_of_sum"] / values["sum_of_squared_norms"]
    assert coherence == pytest.approx(n / (1 + (n - 1) * values["norm_test"]), rel=1e-9)


def test_ground_truth_lies_within_the_error_bars() -> None:
    """tr(Sigma)/|G|^2 is known; 80 runs of 8 pooled readings cover it as often as two standard errors should."""
    size, n, truth = 40, 16, 40 * 1.0 / 4.0
    inside, estimates = 0, []
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        state = None
        for _ in range(8):
            x = torch.randn(n, size, generator=generator, dtype=torch.float64)
            x[:, 0] += 2.0  # |G|^2 = 4
            values, state = read(Mean(size), losses, [x], state)
        e = values["noise_scale"]
        estimates.append(e.value)
        inside += abs(e.value - truth) <= 2 * e.stderr
    assert np.mean(estimates) == pytest.approx(truth, rel=0.1)
    assert inside >= 0.85 * 80


def test_one_reading_has_no_error_bar_and_pooling_is_bounded() -> None:
    x = torch.randn(8, 3, dtype=torch.float64) + 5
    values, state = read(Mean(3), losses, [x])
    assert np.isnan(values["noise_scale"].stderr)
    for _ in range(25):
        values, state = read(Mean(3), losses, [x], state)
    assert len(state["pairs"]) == NoiseScale().pool
    assert values["noise_scale"].stderr == pytest.approx(0.0, abs=1e-9)


def test_the_pool_is_a_ratio_of_sums() -> None:
    estimate = pooled_ratio([(1.0, 1.0), (9.0, 3.0)])
    assert estimate.value == 10 / 4
    left_out = np.array([9 / 3, 1 / 1])
    assert estimate.stderr == pytest.approx(np.sqrt(0.5 * np.square(left_out - left_out.mean()).sum()))
    assert pooled_ratio([(1.0, -1.0)]) == Estimate(float("inf"), pytest.approx(float("nan"), nan_ok=True))


def test_pure_noise_is_infinite_not_negative() -> None:
    x = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    values, _ = read(Mean(1), losses, [x])
    assert values["squared_gradient"] < 0
    assert values["noise_scale"].value == float("inf")
    assert np.isnan(values["norm_test"])


def test_a_gradient_that_is_not_finite_does_not_enter_the_pool() -> None:
    good, bad = torch.ones(4, 2, dtype=torch.float64), torch.full((4, 2), float("nan"), dtype=torch.float64)
    _, state = read(Mean(2), losses, [good])
    values, after = read(Mean(2), losses, [bad], state)
    assert after["pairs"] == state["pairs"]
    assert np.isnan(values["trace_of_covariance"])


def test_one_example_is_refused() -> None:
    with pytest.raises(Refusal, match="two examples"):
        read(Mean(2), losses, [torch.ones(1, 2, dtype=torch.float64)])
