"""Gradient tests and m-coherence: their definitions, the identities between them, and their error bars."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from taking import SOME, case, mean_of, sizes, take
from torch import Tensor
from twins import example_gradients

from instruments import Refusal
from instruments.gradient.coherence import Coherence
from instruments.gradient.gradient_tests import GradientTests
from instruments.gradient.noise_scale import NoiseScale


def three_tests(g_ND: Tensor) -> tuple[float, float, float]:
    """theta^2, theta_in^2 and nu^2 example by example."""
    n, mean_D = len(g_ND), g_ND.mean(0)
    square = float(mean_D @ mean_D)
    deviations = [float((g_D - mean_D) @ (g_D - mean_D)) for g_D in g_ND]
    products = [float(g_D @ mean_D) for g_D in g_ND]
    across = [g_D - (g_D @ mean_D) / square * mean_D for g_D in g_ND]
    theta = sum(deviations) / (n - 1) / (n * square)
    inner = sum((p - square) ** 2 for p in products) / (n - 1) / (n * square**2)
    return theta, inner, sum(float(r_D @ r_D) for r_D in across) / ((n - 1) * n * square)


def left_out(statistic: Any, g_ND: Tensor) -> float:
    """Jackknife by n evaluations without one row each."""
    n = len(g_ND)
    values = np.array([statistic(torch.cat([g_ND[:i], g_ND[i + 1 :]])) for i in range(n)])
    return float(np.sqrt((n - 1) / n * np.square(values - values.mean()).sum()))


@pytest.mark.parametrize("name", SOME)
def test_the_three_tests_follow_their_definitions(name: str) -> None:
    built = case(name)
    g_ND = example_gradients(built.model, built.loss, built.batch)
    values, _, _ = take(GradientTests(), built)
    theta, inner, orthogonal = three_tests(g_ND)
    assert float(values["norm"].value) == pytest.approx(theta, rel=1e-9)
    assert float(values["inner_product"]) == pytest.approx(inner, rel=1e-9)
    assert float(values["orthogonality"]) == pytest.approx(orthogonal, rel=1e-9)
    assert float(values["norm"].stderr) == pytest.approx(left_out(lambda rows: three_tests(rows)[0], g_ND), rel=1e-7)


@pytest.mark.parametrize("name", SOME)
def test_coherence_follows_its_definition(name: str) -> None:
    built = case(name)
    g_ND = example_gradients(built.model, built.loss, built.batch)
    values, _, _ = take(Coherence(), built)

    def alpha(rows: Tensor) -> float:
        return float(rows.sum(0).square().sum() / rows.square().sum())

    def pairs(rows: Tensor) -> float:
        gram = rows @ rows.T
        n = len(rows)
        return float((gram.sum() - gram.trace()) / (n * (n - 1)) / (gram.trace() / n))

    assert float(values["coherence"].value) == pytest.approx(alpha(g_ND), rel=1e-9)
    assert float(values["pairwise"].value) == pytest.approx(pairs(g_ND), rel=1e-9)
    assert float(values["coherence"].stderr) == pytest.approx(left_out(alpha, g_ND), rel=1e-7)
    assert float(values["pairwise"].stderr) == pytest.approx(left_out(pairs, g_ND), rel=1e-7)
    layers = g_ND.split(sizes(built), 1)
    assert values["per_layer"].tolist() == pytest.approx(list(map(alpha, layers)), rel=1e-8, nan_ok=True)
    assert values["pairwise_per_layer"].tolist() == pytest.approx(list(map(pairs, layers)), rel=1e-7, nan_ok=True)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(1, 12), st.integers(0, 10_000), st.floats(-2, 2))
def test_identities_hold_to_rounding(n: int, size: int, seed: int, shift: float) -> None:
    """theta^2 = theta_in^2 + nu^2, alpha = N/(1 + (N - 1) theta^2), pairwise = (alpha - 1)/(N - 1)."""
    generator = torch.Generator().manual_seed(seed)
    built = mean_of(torch.randn(n, size, generator=generator, dtype=torch.float64) + shift)
    tests, coherence = take(GradientTests(), built)[0], take(Coherence(), built)[0]
    theta = float(tests["norm"].value)
    parts = float(tests["inner_product"]) + float(tests["orthogonality"])
    assert abs(parts - theta) <= 1e-12 * max(1.0, theta)
    alpha = float(coherence["coherence"].value)
    assert abs(alpha - n / (1 + (n - 1) * theta)) <= 1e-12 * n
    assert abs(float(coherence["pairwise"].value) - (alpha - 1) / (n - 1)) <= 1e-12
    assert 0 <= alpha <= n * (1 + 1e-12)
    x = float(tests["relative_noise"].value)
    assert x == pytest.approx(theta / (1 - theta) if theta < 1 else np.inf, rel=1e-12)
    noise = take(NoiseScale(), built)[0]["noise_scale"].value
    assert x == pytest.approx(noise / n, rel=1e-6)


def test_ends_of_the_scales() -> None:
    """Identical gradients: no noise, coherence N. Orthogonal ones: coherence 1, all noise."""
    same, orthogonal = mean_of(torch.ones(5, 3, dtype=torch.float64)), mean_of(torch.eye(5, dtype=torch.float64))
    assert float(take(GradientTests(), same)[0]["norm"].value) == pytest.approx(0, abs=1e-15)
    assert float(take(Coherence(), same)[0]["coherence"].value) == pytest.approx(5)
    assert float(take(Coherence(), same)[0]["pairwise"].value) == pytest.approx(1)
    tests = take(GradientTests(), orthogonal)[0]
    assert float(tests["norm"].value) == pytest.approx(1)
    assert float(tests["inner_product"]) == pytest.approx(0, abs=1e-15)
    assert float(take(Coherence(), orthogonal)[0]["coherence"].value) == pytest.approx(1)
    assert float(take(Coherence(), orthogonal)[0]["pairwise"].value) == pytest.approx(0, abs=1e-15)


def test_error_bars_mean_what_they_say() -> None:
    """|G|^2 / E |g|^2 and S^2/(N |G|^2) are known for a Gaussian: two standard errors cover them as they should."""
    generator = torch.Generator().manual_seed(0)
    n, size, signal = 64, 50, 0.5
    square = size * signal**2
    truth = {"pairwise": square / (square + size), "relative_noise": size / (n * square)}
    inside = dict.fromkeys(truth, 0)
    for _ in range(150):
        built = mean_of(signal + torch.randn(n, size, generator=generator, dtype=torch.float64))
        values = {**take(Coherence(), built)[0], **take(GradientTests(), built)[0]}
        for name, true in truth.items():
            inside[name] += abs(float(values[name].value) - true) < 2 * float(values[name].stderr)
    assert all(0.88 * 150 <= count <= 149 for count in inside.values()), inside


def test_micro_batches_are_one_batch() -> None:
    built = case("mlp_weighted")
    x, y = built.batch
    for instrument in (GradientTests(), Coherence()):
        together = take(instrument, built)[0]
        apart = take(instrument, built, batches=[(x[:2], y[:2]), (x[2:], y[2:])])[0]
        for name, value in together.items():
            one, other = (getattr(v, "value", v) for v in (value, apart[name]))
            assert one == pytest.approx(other, rel=1e-9)


def test_no_direction_is_nan_and_one_example_is_refused() -> None:
    """Gradients that are all zero, two that cancel, and a batch of one."""
    zero = mean_of(torch.zeros(4, 3, dtype=torch.float64))
    assert all(np.isnan(float(getattr(v, "value", v))) for v in take(GradientTests(), zero)[0].values())
    assert np.isnan(float(take(Coherence(), zero)[0]["coherence"].value))
    cancel = mean_of(torch.tensor([[1.0], [-1.0]], dtype=torch.float64))
    assert float(take(Coherence(), cancel)[0]["coherence"].value) == 0
    assert float(take(GradientTests(), cancel)[0]["relative_noise"].value) == np.inf
    assert np.isnan(float(take(GradientTests(), cancel)[0]["norm"].stderr))
    for instrument in (GradientTests(), Coherence()):
        with pytest.raises(Refusal, match="at least 2 examples"):
            take(instrument, mean_of(torch.ones(1, 3, dtype=torch.float64)))
