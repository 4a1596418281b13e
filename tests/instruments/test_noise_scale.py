"""Noise scale and norm test: identities, ground truth, and error bars that mean what they say."""

from typing import Any

import numpy as np
import pytest
import torch
from cases import Built
from hypothesis import given, settings
from hypothesis import strategies as st
from taking import SOME, Mean, case, losses, sizes, take
from twins import example_gradients

from instruments import Estimate, Refusal
from instruments.gradient.noise_scale import NoiseScale, limits, pooled_ratio


def read(x: torch.Tensor, state: Any = None, *, pool: int = 20) -> Any:
    return take(NoiseScale(pool=pool), Built(Mean(x.shape[1]), losses, x), state=state)[:2]


def test_moments_follow_their_definitions() -> None:
    built = case("mlp")
    g = example_gradients(built.model, built.loss, built.batch)
    values, _, _ = take(NoiseScale(), built)
    a, q, n = float(g.square().sum()), float(g.sum(0).square().sum()), len(g)
    assert values["sum_of_squared_norms"] == pytest.approx(a, rel=1e-12)
    assert values["squared_norm_of_sum"] == pytest.approx(q, rel=1e-12)
    trace = float(g.var(0).sum())
    assert values["trace_of_covariance"] == pytest.approx(trace, rel=1e-12)
    assert values["squared_gradient"] == pytest.approx(q / n**2 - trace / n, rel=1e-10)
    assert values["norm_test"] == pytest.approx(trace / (n * q / n**2), rel=1e-12)


@pytest.mark.parametrize("name", SOME)
def test_each_layer_is_a_ratio_of_sums_over_two_readings(name: str) -> None:
    first, second = case(name, 0), case(name, 1)
    _, state, _ = take(NoiseScale(), first)
    values, _, _ = take(NoiseScale(), second, state=state)
    rows = [example_gradients(b.model, b.loss, b.batch).split(sizes(b), 1) for b in (first, second)]
    expected = []
    for pieces in zip(*rows, strict=True):
        trace = sum(float(g.var(0).sum()) for g in pieces)
        square = sum(float(g.mean(0).square().sum() - g.var(0).sum() / len(g)) for g in pieces)
        expected.append(trace / square if square > 0 else float("inf") if trace > 0 else float("nan"))
    assert values["per_layer"].tolist() == pytest.approx(expected, rel=1e-6, nan_ok=True)
    assert np.isnan(values["per_layer"]).any() == (name == "called_twice_unused")


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.integers(1, 8), st.integers(0, 10_000), st.floats(1e-3, 1e3))
def test_norm_test_and_coherence_are_one_number(n: int, size: int, seed: int, scale: float) -> None:
    """Q/A = N / (1 + (N - 1) theta^2): the m-coherence follows from the norm test."""
    x = scale * torch.randn(n, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1
    values, _ = read(x)
    coherence = values["squared_norm_of_sum"] / values["sum_of_squared_norms"]
    assert coherence == pytest.approx(n / (1 + (n - 1) * values["norm_test"]), rel=1e-9)


def runs(signal: float, readings: int, count: int, *, seed: int = 0) -> list[Any]:
    """The last values of `count` runs of pooled readings, 16 examples of unit noise in 40 coordinates each."""
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        state = None
        for _ in range(readings):
            x = torch.randn(16, 40, generator=generator, dtype=torch.float64)
            x[:, 0] += signal
            values, state = read(x, state)
        found.append(values)
    return found


def test_ground_truth_lies_within_the_error_bars() -> None:
    """tr(Sigma)/|G|^2 is known; 80 runs of 8 pooled readings cover it as often as two standard errors should."""
    truth = 40 / 2.0**2
    found = runs(2.0, 8, 80)
    estimates = [values["noise_scale"] for values in found]
    assert np.mean([e.value for e in estimates]) == pytest.approx(truth, rel=0.1)
    assert sum(abs(e.value - truth) <= 2 * e.stderr for e in estimates) >= 0.85 * 80
    assert sum(values["at_least"] <= truth <= values["at_most"] for values in found) >= 0.85 * 80
    assert all(v["at_least"] <= v["noise_scale"].value <= v["at_most"] for v in found)


@pytest.mark.parametrize("signal", [0.0, 0.3])
def test_noise_that_cannot_be_told_from_infinite_has_a_lower_limit_that_holds(signal: float) -> None:
    """|G|^2 of 0 or 0.09 against its error of 0.15 to 0.3: the upper limit is open, the lower one is right."""
    truth = 40 / signal**2 if signal else np.inf
    found = runs(signal, 10, 60)
    lower = np.array([values["at_least"] for values in found])
    assert np.mean(lower <= truth) >= 0.9
    assert np.median(lower) > 40
    open_above = [values["at_most"] == np.inf for values in found]
    assert np.mean(open_above) > 0.5
    infinite = [values["noise_scale"].value == np.inf for values in found]
    assert any(infinite)
    assert all(up for up, none in zip(open_above, infinite, strict=True) if none)


def test_limits_are_those_of_fieller() -> None:
    """B is within the limits exactly when the mean of S^2 - B G^2 is within two standard errors of zero."""
    rng = np.random.default_rng(0)
    for offset in (0.2, 1.0, 3.0):
        pairs = np.stack([rng.normal(5, 0.5, 12), rng.normal(offset, 1.0, 12)], 1)
        lower, upper = limits([tuple(row) for row in pairs.tolist()])

        def inside(b: float, pairs: np.ndarray = pairs) -> bool:
            differences = pairs[:, 0] - b * pairs[:, 1]
            return abs(differences.mean()) <= 2 * differences.std(ddof=1) / np.sqrt(len(pairs))

        assert [inside(lower * 0.999), inside(lower * 1.001)] == [False, True]
        if np.isfinite(upper):
            assert [inside(upper * 0.999), inside(upper * 1.001)] == [True, False]
        else:
            assert inside(1e9)
    assert limits([(1.0, 1.0)]) == pytest.approx((np.nan, np.nan), nan_ok=True)
    assert limits([(4.0, 2.0)] * 3) == pytest.approx((2.0, 2.0))
    assert limits([(4.0, -2.0), (4.0, -2.1)]) == (np.inf, np.inf)


def test_one_reading_has_no_error_bar_and_pooling_is_bounded() -> None:
    x = torch.randn(8, 3, dtype=torch.float64) + 5
    values, state = read(x)
    assert np.isnan(values["noise_scale"].stderr)
    assert np.isnan(values["at_least"])
    for _ in range(25):
        values, state = read(x, state)
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
    values, _ = read(x)
    assert values["squared_gradient"] < 0
    assert values["noise_scale"].value == float("inf")
    assert values["per_layer"].tolist() == [float("inf")]
    assert np.isnan(values["norm_test"])


def test_a_gradient_that_is_not_finite_reads_nan_and_does_not_enter_the_pool() -> None:
    good = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, state = read(good)
    _, state = read(good + 1, state)
    for known in (state, None):
        bad, after = read(torch.full_like(good, float("nan")), known)
        assert np.isnan([bad["noise_scale"].value, bad["at_least"], bad["at_most"]]).all()
        assert np.isnan(bad["trace_of_covariance"])
        assert np.isnan(bad["per_layer"]).all()
        assert len(after["pairs"]) == (0 if known is None else 2)
    _, undisturbed = read(good + 2, state)
    values, after = read(good + 2, read(torch.full_like(good, float("nan")), state)[1])
    assert torch.equal(after["pairs"], undisturbed["pairs"])
    assert np.isfinite(values["noise_scale"].value)


def test_a_model_that_has_grown_starts_a_new_pool() -> None:
    _, state, _ = take(NoiseScale(), case("mlp"))
    _, after, _ = take(NoiseScale(), case("cnn"), state=state)
    assert len(after["pairs"]) == 1


def test_one_example_is_refused() -> None:
    with pytest.raises(Refusal, match="at least 2 examples"):
        read(torch.ones(1, 2, dtype=torch.float64))
