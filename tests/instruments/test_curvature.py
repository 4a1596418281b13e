"""Sharpness and preconditioned sharpness as read, against dense matrices."""

from typing import Any

import pytest
import torch
from cases import BY_NAME, CASES, Case, build
from torch import nn
from twins import dense_hessian, trainable

from instruments import Probe, View
from instruments.curvature.preconditioned_sharpness import PreconditionedSharpness
from instruments.curvature.sharpness import Sharpness
from instruments.held import HeldBatches
from instruments.layout import Layout
from instruments.objective import as_objective
from instruments.preconditioners import read_preconditioner

SMOOTH = [case for case in CASES if not case.random and case.name != "in_place_relu"]


def reading(instrument: Any, model: nn.Module, loss: Any, batch: Any, optimizers: Any = (), state: Any = None) -> Any:
    probe = Probe(model, as_objective(loss), list(optimizers), [batch], held=HeldBatches([batch]))
    with probe:
        view = View(probe, instrument.needs)
        values, state = instrument.advance(view, state or instrument.init())
    return values, state, view.meter


@pytest.mark.parametrize("case", SMOOTH, ids=lambda case: case.name)
def test_sharpness_is_the_top_of_the_dense_hessian(case: Case) -> None:
    built = build(case)
    top = float(torch.linalg.eigvalsh(dense_hessian(built.model, built.loss, built.batch))[-1])
    for seed in range(3):
        values, _, meter = reading(Sharpness(tol=1e-3), built.model, built.loss, build(case, 0).batch)
        assert values["sharpness"] == pytest.approx(top, rel=5e-3), seed
        assert values["converged"] == 1.0
        assert meter.products >= 1


@pytest.mark.parametrize("case", SMOOTH, ids=lambda case: case.name)
def test_rho_is_the_top_of_the_dense_preconditioned_hessian(case: Case) -> None:
    built = build(case)
    params = list(trainable(built.model).values())
    half = max(1, len(params) // 2)
    groups = [{"params": params[:half], "lr": 1e-2}, {"params": params[half:], "lr": 3e-3, "betas": (0.5, 0.9)}]
    optimizer = torch.optim.Adam([g for g in groups if g["params"]], weight_decay=0.1)
    objective = as_objective(built.loss)
    grads = torch.autograd.grad(objective.parts(built.model, built.batch).loss, params, allow_unused=True)
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    scale = read_preconditioner([optimizer], Layout.of(built.model), grads)
    root = scale.scale_D.sqrt()
    h = dense_hessian(built.model, built.loss, built.batch) + torch.diag(scale.decay_D)
    eigenvalues, vectors = torch.linalg.eigh(root[:, None] * h * root / 2)
    values, _, _ = reading(
        PreconditionedSharpness(tol=1e-4, max_products=200), built.model, built.loss, built.batch, [optimizer]
    )
    assert values["rho"] == pytest.approx(float(eigenvalues[-1]), rel=5e-3)
    if eigenvalues[-1] > 0:
        assert values["headroom"] == pytest.approx(1 / values["rho"])
    gap = float(eigenvalues[-1] - eigenvalues[-2]) / float(eigenvalues[-1])
    if gap > 0.05:
        pieces = vectors[:, -1].square().split([p.numel() for p in params])
        mass = sum(float(piece.sum()) for piece, g in zip(pieces[:half], grads[:half], strict=True) if g is not None)
        assert float(values["group_mass"][0]) == pytest.approx(mass, abs=2e-2)
    assert float(values["group_mass"].sum()) == pytest.approx(1.0)


def small_problem(seed: int) -> tuple[nn.Module, Any, Any]:
    """329 parameters, real curvature: blobs with overlapping classes."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, 8, generator=g)
    y = torch.randint(0, 5, (128,), generator=g)
    x = centres[y] + 0.8 * torch.randn(128, 8, generator=g)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 5))
    return model.double(), x.double(), y


def test_the_error_stays_inside_the_bound_at_the_default_tolerance() -> None:
    """200 tracked readings along training with SGD and Adam, dense references."""
    inside = []
    for seed in range(4):
        model, x, y = small_problem(seed)
        params = list(model.parameters())
        optimizer = torch.optim.Adam(params, lr=3e-3) if seed % 2 else torch.optim.SGD(params, lr=0.2)
        state = None
        for step in range(500):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            if step % 10 == 0:
                values, state, _ = reading(Sharpness(), model, nn.CrossEntropyLoss(), (x, y), [optimizer], state)
                f = autograd_hessian(model, x, y)
                error = float(torch.linalg.eigvalsh(f)[-1]) - values["sharpness"]
                inside.append(-1e-9 <= error <= values["bound"] + 1e-9)
            optimizer.step()
    assert len(inside) == 200
    assert sum(inside) >= 196, f"{sum(inside)} of 200"


def autograd_hessian(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    params = list(model.parameters())
    grads = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), params, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in grads])
    eye = torch.eye(flat.numel(), dtype=flat.dtype)
    rows = torch.autograd.grad(flat, params, grad_outputs=eye, is_grads_batched=True)
    return torch.cat([r.reshape(flat.numel(), -1) for r in rows], 1)


def test_frozen_learning_rate_of_zero_gives_rho_zero() -> None:
    built = build(BY_NAME["mlp"])
    optimizer = torch.optim.SGD(built.model.parameters(), lr=0.0)
    built.loss(built.model(built.batch[0]), built.batch[1]).backward()
    values, _, _ = reading(PreconditionedSharpness(), built.model, built.loss, built.batch, [optimizer])
    assert (values["rho"], values["headroom"]) == (0.0, float("inf"))


def test_a_broken_model_reads_nan_and_the_next_reading_starts_cold() -> None:
    built = build(BY_NAME["mlp"])
    _, state, _ = reading(Sharpness(), built.model, built.loss, built.batch)
    weight = built.model[0].weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    values, state, _ = reading(Sharpness(), built.model, built.loss, built.batch, state=state)
    assert values["sharpness"] != values["sharpness"]
    assert values["converged"] == 0.0
    with torch.no_grad():
        weight.copy_(kept)
    values, _, _ = reading(Sharpness(tol=1e-4), built.model, built.loss, built.batch, state=state)
    top = float(torch.linalg.eigvalsh(dense_hessian(built.model, built.loss, built.batch))[-1])
    assert values["sharpness"] == pytest.approx(top, rel=1e-3)
