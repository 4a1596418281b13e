"""Evidence-based criterion: its definition, where it stands without signal, and what is left out."""

from typing import Any

import numpy as np
import pytest
import torch
from taking import SOME, case, mean_of, take
from twins import example_gradients

from instruments import Refusal
from instruments.gradient.early_stopping import EarlyStopping


@pytest.mark.parametrize("name", SOME)
def test_it_follows_its_definition(name: str) -> None:
    built = case(name)
    g_ND = example_gradients(built.model, built.loss, built.batch)
    n, ratios, silent = len(g_ND), [], 0
    for column in g_ND.T:
        variance = float(column.var())
        if float(column.abs().max()) < 1e-13 or variance <= 1e-14 * float(column.square().mean()):
            silent += 1
            continue
        ratios.append(n * float(column.mean()) ** 2 / variance)
    values, state, _ = take(EarlyStopping(), built)
    assert values["of_batch"] == pytest.approx(1 - np.mean(ratios), rel=1e-6)
    assert values["criterion"].value == values["of_batch"]
    assert np.isnan(values["criterion"].stderr)
    assert values["corrected"].value == pytest.approx(1 - (n - 3) / (n - 1) * np.mean(ratios), rel=1e-6)
    assert values["silent"] == pytest.approx(silent / g_ND.shape[1])
    assert len(state["readings"]) == 1


def pooled(n: int, signal: float, generator: torch.Generator, readings: int = 20) -> Any:
    state = None
    for _ in range(readings):
        x = signal + torch.randn(n, 200, generator=generator, dtype=torch.float64)
        values, state, _ = take(EarlyStopping(), mean_of(x), state=state)
    return values


@pytest.mark.parametrize("n", [8, 16])
def test_without_signal_the_corrected_one_is_zero_and_the_published_one_is_biased(n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    runs = [pooled(n, 0.0, generator) for _ in range(25)]
    inside = sum(abs(run["corrected"].value) <= 2 * run["corrected"].stderr for run in runs)
    assert inside >= 20
    assert abs(np.mean([run["corrected"].value for run in runs])) < 0.01
    assert np.mean([run["criterion"].value for run in runs]) == pytest.approx(-2 / (n - 3), rel=0.15)


def test_signal_says_go_on_and_a_vanished_gradient_says_stop() -> None:
    signal = pooled(16, 0.5, torch.Generator().manual_seed(1))
    assert signal["corrected"].value < -10 * signal["corrected"].stderr
    x = torch.randn(16, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert take(EarlyStopping(), mean_of(x - x.mean(0)))[0]["of_batch"] == pytest.approx(1.0)


def test_the_pool_is_a_mean_of_the_last_readings() -> None:
    generator, state, alone = torch.Generator().manual_seed(0), None, []
    for _ in range(5):
        x = torch.randn(6, 9, generator=generator, dtype=torch.float64)
        values, state, _ = take(EarlyStopping(pool=3), mean_of(x), state=state)
        alone.append(values["of_batch"])
    assert values["criterion"].value == pytest.approx(np.mean(alone[-3:]))
    assert values["criterion"].stderr == pytest.approx(np.std(alone[-3:], ddof=1) / np.sqrt(3))
    assert len(state["readings"]) == 3


def test_dead_coordinates_are_left_out_and_counted() -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = take(EarlyStopping(), mean_of(x[:, 3:]))[0]["of_batch"]
    x[:, :3] = 2.0
    values, _, _ = take(EarlyStopping(), mean_of(x))
    assert values["silent"] == 0.5
    assert values["of_batch"] == pytest.approx(expected)


@pytest.mark.parametrize("somewhere", [slice(None), 0], ids=["everywhere", "in one example"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_reads_nan_and_is_not_pooled(bad: float, somewhere: Any) -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, state, _ = take(EarlyStopping(), mean_of(x))
    x[somewhere, :2] = bad
    values, after, _ = take(EarlyStopping(), mean_of(x), state=state)
    assert np.isnan([values["of_batch"], values["silent"]]).all()
    assert np.isnan([values["criterion"].value, values["corrected"].value]).all()
    assert after["readings"] == state["readings"]


def test_a_batch_without_variance_has_no_criterion_and_keeps_the_pooled_one() -> None:
    good = mean_of(torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    before, state, _ = take(EarlyStopping(), good)
    values, after, _ = take(EarlyStopping(), mean_of(torch.full((8, 6), 2.0, dtype=torch.float64)), state=state)
    assert np.isnan(values["of_batch"])
    assert values["silent"] == 1.0
    assert values["criterion"].value == before["criterion"].value
    assert after["readings"] == state["readings"]


def test_three_examples_have_no_mean_to_correct() -> None:
    with pytest.raises(Refusal, match="at least 4 examples"):
        take(EarlyStopping(), mean_of(torch.eye(3, dtype=torch.float64)))
