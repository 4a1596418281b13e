"""Histograms of the gradient: every count by hand, the bounded sample, and what is in no bin."""

from bisect import bisect_left
from typing import Any

import numpy as np
import pytest
import torch
from cases import Built
from taking import SOME, case, mean_of, take
from torch import Tensor, nn
from twins import trainable

from instruments import Probe, Refusal, View
from instruments.gradient._bins import Powers, histogram, strided_sample, symmetric_limits
from instruments.gradient.histogram import FIXED, Histogram
from instruments.gradient.histogram_2d import Histogram2d
from instruments.objective import as_objective


def with_grad(*grads: Tensor) -> Built:
    """A model whose parameters have these gradients."""
    model = nn.ParameterList([nn.Parameter(torch.ones_like(g)) for g in grads])
    for p, g in zip(model, grads, strict=True):
        p.grad = g
    return Built(model, nn.MSELoss(), (torch.zeros(1), torch.zeros(1)))


def pairs_of(built: Built) -> list[tuple[float, float]]:
    """(gradient, value) of every element that has a gradient."""
    params = [p for p in trainable(built.model).values() if p.grad is not None]
    flat = [(p.grad.flatten().tolist(), p.detach().flatten().tolist()) for p in params]
    return [pair for g, p in flat for pair in zip(g, p, strict=True)]


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("bins", ["fixed", "adaptive"])
def test_every_element_is_in_its_bin(name: str, bins: Any) -> None:
    built = case(name)
    values, _, _ = take(Histogram(bins=bins), built)
    limits, counts = values["histogram"].tolist()
    elements = [g for g, _ in pairs_of(built)]
    expected = [0] * len(limits)
    for g in elements:
        expected[bisect_left(limits, g)] += 1
    assert counts == expected
    assert limits == sorted(limits)
    assert limits[-1] == np.inf
    assert float(values["zeros"]) == pytest.approx(elements.count(0.0) / len(elements))
    assert float(values["largest"]) == max(map(abs, elements))
    small = sum(0 < abs(g) < 2**-24 for g in elements) / len(elements)
    assert (float(values["underflow"].value), float(values["underflow"].stderr)) == (pytest.approx(small), 0.0)


def test_counts_by_exponent_are_those_of_a_search() -> None:
    """Random signs and sizes from below the smallest limit to beyond the largest, and every limit itself."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, dtype=torch.float64, generator=generator)
    x = x * torch.exp(30 * torch.randn(4000, dtype=torch.float64, generator=generator))
    powers = 2.0 ** torch.arange(-42.0, 15.0, dtype=torch.float64)
    odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 5e-324, -5e-324], dtype=torch.float64)
    sample = torch.cat([x, powers, -powers, torch.nextafter(powers, powers * 2), torch.nextafter(powers, -powers), odd])
    by_search = histogram(sample, symmetric_limits(*FIXED, sample.device))
    by_exponent = Powers(sample).histogram(*FIXED)
    assert torch.equal(by_exponent, by_search)
    assert by_exponent[1].sum() == len(sample) - 2
    assert (by_exponent[1] > 0).all()


@pytest.mark.parametrize("name", SOME)
def test_every_pair_is_in_its_cell(name: str) -> None:
    built = case(name)
    values, _, _ = take(Histogram2d(), built)
    grid = values["grid"].numpy()
    across, down, counts = grid[0, 1:], grid[1:, 0], grid[1:, 1:]
    expected = np.zeros_like(counts)
    for g, p in pairs_of(built):
        expected[bisect_left(down.tolist(), p), bisect_left(across.tolist(), g)] += 1
    assert np.array_equal(counts, expected)
    assert np.isnan(grid[0, 0])
    assert np.array_equal(values["gradient"].numpy(), [across, counts.sum(0)])
    assert np.array_equal(values["parameter"].numpy(), [down, counts.sum(1)])
    alone = take(Histogram(bins="adaptive"), built)[0]["histogram"]
    assert counts.sum() == alone[1].sum()


def test_half_precision_shares_zeros_and_what_is_not_finite() -> None:
    g = torch.tensor([0.0, 0.0, 1e-8, -3e-8, 6.1e-8, 1.0, -7e4, torch.inf, -torch.inf, torch.nan])
    values, _, _ = take(Histogram(), with_grad(g, torch.zeros(0)))
    assert float(values["zeros"]) == pytest.approx(0.2)
    assert float(values["underflow"].value) == pytest.approx(0.2)
    assert float(values["overflow"].value) == pytest.approx(0.3)
    assert float(values["not_finite"].value) == pytest.approx(0.3)
    assert np.isnan(float(values["largest"]))
    limits, counts = values["histogram"]
    assert counts.sum() == 9
    assert (counts[0], counts[-1]) == (2, 1)
    assert counts[limits.tolist().index(2.0**-40)] == 2  # the middle bin holds the zeros
    both, _, _ = take(Histogram2d(), with_grad(g, torch.zeros(0)))
    assert both["grid"][1:, 1:].sum() == 9


@pytest.mark.parametrize("bins", ["fixed", "adaptive"])
def test_a_gradient_of_zeros_is_in_the_middle(bins: Any) -> None:
    values, _, _ = take(Histogram(bins=bins), with_grad(torch.zeros(4, 3)))
    counts = values["histogram"][1]
    assert counts[len(counts) // 2] == 12
    assert float(values["zeros"]) == 1
    assert take(Histogram2d(), with_grad(torch.zeros(4, 3)))[0]["grid"][1:, 1:].sum() == 12


def test_the_sample_is_bounded_and_its_error_bar_right() -> None:
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(40):
        g = torch.randn(300, 400, generator=generator)
        g[torch.rand(300, 400, generator=generator) < 0.1] = 1e-9
        values, _, _ = take(Histogram(sample=2000), with_grad(g, torch.ones(3)))
        assert 1900 < values["histogram"][1].sum() <= 2003
        share = values["underflow"]
        found.append(abs(float(share.value) - 0.1) <= 2 * float(share.stderr))
        assert float(share.stderr) == pytest.approx(np.sqrt(0.1 * 0.9 / 2000), rel=0.2)
    assert sum(found) >= 34


@pytest.mark.parametrize("shape", [(512, 256), (100, 1000), (64, 32, 3, 3), (7,), (1,)])
def test_the_sample_walks_through_every_row_and_column(shape: tuple[int, ...]) -> None:
    for axis, size in enumerate(shape):
        index = torch.arange(size).view([-1 if a == axis else 1 for a in range(len(shape))]).expand(shape)
        seen = strided_sample([index.double()], 4000)
        assert len(seen.unique()) == size
    assert len(strided_sample([torch.zeros(shape)] * 3, 1)) == 3


def test_adaptive_bins_move_with_the_scale_and_hold_the_bulk() -> None:
    g = torch.randn(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, other = (take(Histogram(bins="adaptive"), with_grad(s * g))[0]["histogram"] for s in (1.0, 2.0**-30))
    assert torch.allclose(one[0] * 2.0**-30, other[0], rtol=1e-12, atol=0)
    assert torch.equal(one[1], other[1])
    assert one[1][[0, len(one[1]) // 2, -1]].sum() < 100  # 1 % of the sizes to either end, less by rounding
    fixed = (take(Histogram(), with_grad(s * g))[0]["histogram"][0] for s in (1.0, 2.0**-30))
    assert torch.equal(*fixed)


def test_sparse_gradients_are_counted_with_their_zeros() -> None:
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        embedding = nn.Embedding(20, 4, sparse=sparse)
        embedding(torch.tensor([1, 5, 1])).square().sum().backward()
        found.append(take(Histogram(), Built(embedding, nn.MSELoss(), (torch.zeros(1), torch.zeros(1))))[0])
    assert torch.equal(found[0]["histogram"], found[1]["histogram"])
    assert float(found[0]["zeros"]) == float(found[1]["zeros"]) == 0.9


def test_the_loss_scale_is_taken_out() -> None:
    built = with_grad(torch.tensor([1.0, 2.0]) * 1024)
    with Probe(built.model, as_objective(built.loss), [], [built.batch], loss_scale=1024.0) as probe:
        values = Histogram().read(View(probe, Histogram.needs))
    assert float(values["largest"]) == 2.0  # type: ignore[arg-type]


def test_what_cannot_be_read_or_set() -> None:
    built = mean_of(torch.ones(2, 2))
    for instrument in (Histogram(), Histogram2d()):
        with pytest.raises(Refusal, match="no parameter has a gradient"):
            take(instrument, built)
        with pytest.raises(Refusal, match="complex"):
            take(instrument, with_grad(torch.ones(2, dtype=torch.complex64)))
    with pytest.raises(ValueError, match="fixed, adaptive"):
        Histogram(bins="linear")  # type: ignore[arg-type]
    for make in (Histogram, Histogram2d):
        with pytest.raises(ValueError, match="at least one element"):
            make(sample=0)
