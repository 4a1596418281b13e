"""Curvature along the gradients of single mini-batches, against dense Hessians of those batches."""

from typing import Any

import numpy as np
import pytest
import torch
from cases import BY_NAME, Built, build
from taking import SOME, case, take
from torch import Tensor, nn, optim
from twins import dense_hessian, total_loss, trainable

from instruments.curvature.batch_sharpness import BatchSharpness, mean_of, ratio_of_sums
from instruments.held import HeldBatches
from instruments.instrument import Estimate
from instruments.layout import Layout
from instruments.objective import as_objective
from instruments.preconditioners import read_preconditioner
from instruments.probe import Probe
from instruments.view import View

DRAWS = 300
POOLED = ("batch_sharpness", "ratio_of_means", "momentum_form", "preconditioned")


def gradient(built: Built) -> Tensor:
    params = list(trainable(built.model).values())
    loss = total_loss(built.model, built.loss, built.batch)
    grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
    return torch.cat([g.reshape(-1) for g in grads])


@pytest.mark.parametrize("name", SOME)
def test_a_reading_is_that_of_the_dense_hessian_of_the_batch(name: str) -> None:
    built = case(name)
    optimizer = optim.SGD(built.model.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
    buffers = []
    for i, p in enumerate(trainable(built.model).values()):
        b = torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype)
        optimizer.state[p]["momentum_buffer"] = b
        buffers.append(b.reshape(-1))
    h_DD, g_D = dense_hessian(built.model, built.loss, built.batch), gradient(built)
    s_D = 0.9 * torch.cat(buffers) + 0.5 * g_D
    values, _, _ = take(BatchSharpness(), built, [optimizer])
    plain = float(g_D @ h_DD @ g_D / (g_D @ g_D))
    assert values["this_batch"] == pytest.approx(plain, rel=1e-4, abs=1e-7)
    assert values["batch_sharpness"].value == pytest.approx(plain, rel=1e-4, abs=1e-7)
    along = float(s_D @ g_D)
    form = values["momentum_form"].value
    assert form == pytest.approx(float(s_D @ h_DD @ s_D) / along, rel=1e-4) if along > 0 else np.isnan(form)
    layout = Layout.of(built.model)
    d_D = read_preconditioner([optimizer], layout, [p.grad for p in layout.params]).scale_D * g_D
    assert values["preconditioned"].value == pytest.approx(float(d_D @ h_DD @ d_D / (g_D @ d_D)), rel=1e-4, abs=1e-7)
    assert values["low_line"] == pytest.approx(2 * (1 - 0.9) / (0.1 * 0.5))
    assert values["high_line"] == pytest.approx(2 * (1 + 0.9) / (0.1 * 0.5))
    assert np.isnan(values["batch_sharpness"].stderr)
    assert values["readings"] == 1.0


def test_it_is_the_batch_of_the_step_and_not_the_held_one() -> None:
    built, other = build(BY_NAME["mlp"]), build(BY_NAME["mlp"], 1)
    held = HeldBatches([other.batch])
    total_loss(built.model, built.loss, built.batch).backward()
    optimizer = optim.SGD(built.model.parameters(), lr=0.1)
    with Probe(built.model, as_objective(built.loss), [optimizer], [built.batch], held=held) as probe:
        view = View(probe, BatchSharpness.needs)
        values, _ = BatchSharpness().advance(view, BatchSharpness().init())
    h_DD, g_D = dense_hessian(built.model, built.loss, built.batch), gradient(built)
    assert values["this_batch"] == pytest.approx(float(g_D @ h_DD @ g_D / (g_D @ g_D)), rel=1e-4)
    assert view.meter.provenance["batch"] == "step"


def test_micro_batches_are_one_batch() -> None:
    built = case("mlp")
    x, y = built.batch
    optimizer = optim.SGD(built.model.parameters(), lr=0.1)
    whole, _, _ = take(BatchSharpness(), built, [optimizer])
    parts, _, _ = take(BatchSharpness(), built, [optimizer], batches=[(x[:2], y[:2]), (x[2:], y[2:])])
    assert parts["this_batch"] == pytest.approx(whole["this_batch"])


def test_without_momentum_all_forms_say_the_same() -> None:
    built = case("mlp")
    values, _, _ = take(BatchSharpness(), built, [optim.SGD(built.model.parameters(), lr=0.1)])
    assert values["momentum_form"].value == pytest.approx(values["this_batch"])
    assert values["preconditioned"].value == pytest.approx(0.1 * values["this_batch"])
    assert values["low_line"] == values["high_line"] == pytest.approx(20.0)


def test_coupled_weight_decay_lowers_both_lines() -> None:
    built = case("mlp")
    optimizer = optim.SGD(built.model.parameters(), lr=0.1, momentum=0.5, weight_decay=0.5)
    values, _, _ = take(BatchSharpness(), built, [optimizer])
    assert values["low_line"] == pytest.approx(10.0 - 0.5)
    assert values["high_line"] == pytest.approx(30.0 - 0.5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_at_the_edge_of_a_parabola(momentum: float) -> None:
    """Full batch, alternating: batch sharpness on the upper line, the momentum form on 2/eta, preconditioned on 2."""
    edge = 2 * (1 + momentum)
    theta = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(theta.weight)
    x = torch.ones(1, 1, dtype=torch.float64)
    built = Built(theta, lambda call, batch: call(batch)[:, 0].square() / 2, x)
    optimizer = optim.SGD(theta.parameters(), lr=edge, momentum=momentum)
    for _ in range(400):
        theta.weight.grad = theta.weight.detach().clone()
        optimizer.step()
    values, _, _ = take(BatchSharpness(), built, [optimizer])
    assert values["batch_sharpness"].value == pytest.approx(1.0)
    assert values["high_line"] == pytest.approx(1.0)
    assert values["momentum_form"].value == pytest.approx(2 / edge, rel=1e-3)
    theta.weight.grad = theta.weight.detach().clone()
    assert take(BatchSharpness(), built, [optimizer])[0]["preconditioned"].value == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: optim.Adam(p, lr=0.01), "not for Adam"),
        (lambda p: optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True), "not for Nesterov"),
        (lambda p: optim.SGD([{"params": p[:1]}, {"params": p[1:], "lr": 0.1}], lr=0.01), "several learning rates"),
    ],
)
def test_what_is_not_defined_is_nan_with_its_reason(make: Any, reason: str) -> None:
    built = case("mlp")
    values, _, provenance = take(BatchSharpness(), built, [make(list(built.model.parameters()))])
    assert reason in provenance["momentum_form"]
    assert np.isnan([values["low_line"], values["high_line"], values["momentum_form"].value]).all()
    assert np.isfinite([values["this_batch"], values["preconditioned"].value]).all()


def test_an_optimizer_nobody_knows_leaves_the_plain_forms() -> None:
    built = case("mlp")
    values, _, provenance = take(BatchSharpness(), built, [optim.Rprop(built.model.parameters())])
    assert np.isfinite(values["this_batch"])
    assert np.isnan(values["preconditioned"].value)
    assert "Rprop" in provenance["preconditioned"]


def test_both_means_cover_their_expectations() -> None:
    """Squared gradients g^2 and curvatures c: the mean of ratios is for E c, the ratio of means for E c g^2 / E g^2."""
    g = np.random.default_rng(0)
    inside = np.zeros(2)
    for _ in range(DRAWS):
        squares = g.gamma(3.0, size=20)
        curvatures = 5.0 + squares / 3 + g.normal(size=20)  # E = 6, weighted by the squares 5 + (9 + 3)/9
        tops = curvatures * squares
        found = mean_of(tops, squares), ratio_of_sums(np.stack([tops, squares], 1))
        for i, (estimate, truth) in enumerate(zip(found, (6.0, 5 + 4 / 3), strict=True)):
            inside[i] += abs(estimate.value - truth) <= 3 * estimate.stderr
    assert (inside >= 0.97 * DRAWS).all(), inside


def test_one_reading_that_drowns_the_others_has_no_known_error() -> None:
    found = ratio_of_sums(np.array([[2e30, 1e30], [1.0, 1.0]]))
    assert (found.value, found.stderr) == (2.0, np.inf)


def test_pooling_forgets_and_a_batch_that_is_not_finite_reads_nan_and_leaves_no_trace() -> None:
    built, state = case("mlp"), None
    optimizer = optim.SGD(built.model.parameters(), lr=0.1)
    kept = built.model[0].weight.detach().clone()
    seen = []
    for step in range(5):
        with torch.no_grad():
            built.model[0].weight.copy_(kept * (torch.nan if step == 3 else 1 + step / 10))
        values, state, _ = take(BatchSharpness(pool=3), built, [optimizer], state=state, step=step)
        seen.append(values["this_batch"])
        pooled = [values[name].value for name in POOLED]
        assert np.isnan([seen[-1], *pooled]).all() if step == 3 else np.isfinite([seen[-1], *pooled]).all()
        assert values["readings"] == (0.0 if step == 3 else min(len(state["sums"]), 3))
    last = [seen[1], seen[2], seen[4]]
    assert values["batch_sharpness"].value == pytest.approx(np.mean(last))
    assert values["batch_sharpness"].stderr == pytest.approx(np.std(last, ddof=1) / np.sqrt(3))
    assert isinstance(values["ratio_of_means"], Estimate)


def test_a_batch_without_gradient_has_no_ratio_and_keeps_the_pooled_ones() -> None:
    built = case("mlp")
    optimizer = optim.SGD(built.model.parameters(), lr=0.1)
    before, state, _ = take(BatchSharpness(), built, [optimizer])
    flat = Built(built.model, lambda call, batch: 0 * call(batch[0]).square().sum(1), built.batch)
    values, _, _ = take(BatchSharpness(), flat, [optimizer], state=state)
    assert np.isnan(values["this_batch"])
    assert [values[name] for name in POOLED] == [
        Estimate(pytest.approx(before[name].value), pytest.approx(before[name].stderr, nan_ok=True)) for name in POOLED
    ]


@pytest.mark.parametrize("scale", [1e-18, 1e15])
def test_ratios_are_those_of_the_loss_whatever_its_unit(scale: float) -> None:
    """In single precision, where squares of such gradients are zero or infinite."""
    model, batch = nn.Linear(4, 3), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    found = []
    for unit in (1.0, scale):
        built = Built(model, lambda call, x, unit=unit: unit * call(x).square().sum(1), batch)
        model.zero_grad()
        total_loss(model, built.loss, batch).backward()
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        values, state, _ = take(BatchSharpness(), built, [optimizer])
        values, _, _ = take(BatchSharpness(), built, [optimizer], state=state)
        found.append([values["this_batch"] / unit, *(values[name].value / unit for name in POOLED)])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
