"""Hessian products by differences of the gradient: right where the loss is smooth, honest where it is not."""

from typing import Any

import pytest
import torch
from cases import CASES, Built, Case, build
from gauss_newton_twin import matrix_of, pinned
from torch import nn
from twins import flat_loss

from instruments.guard import untouched
from instruments.layout import Layout
from instruments.objective import addends, as_objective
from instruments.operators.finite_difference import FiniteDifferenceOperator, default_step
from instruments.operators.hessian import HessianOperator

SMOOTH = [case for case in CASES if case.name not in ("in_place_relu", "cnn", "dropout")]


def pieces(built: Built) -> Any:
    objective = as_objective(built.loss)
    return [lambda: addends(objective, objective.parts(built.model, built.batch))]


def differences(built: Built, **options: Any) -> FiniteDifferenceOperator:
    return FiniteDifferenceOperator(pieces(built), Layout.of(built.model), context=pinned, **options)


@pytest.mark.parametrize("case", SMOOTH, ids=lambda case: case.name)
def test_equals_double_backward_on_smooth_losses(case: Case) -> None:
    built = build(case)
    with untouched(built.model):
        exact = matrix_of(HessianOperator(pieces(built), Layout.of(built.model), context=pinned))
        measured = matrix_of(differences(built))
    assert torch.allclose(measured, exact, atol=1e-6 * float(exact.abs().max()))


def test_the_length_of_the_vector_does_not_matter() -> None:
    operator = differences(build(CASES[0]))
    v_D = torch.randn(operator.size, dtype=torch.float64)
    one = operator.matvec(v_D)
    for factor in (1e-8, -1e6):
        assert torch.allclose(operator.matvec(factor * v_D) / factor, one, atol=1e-9 * float(one.norm()))
    assert torch.equal(operator.matvec(0 * v_D), torch.zeros_like(v_D))


def test_gradient() -> None:
    built = build(CASES[0])
    f, theta_D = flat_loss(built.model, built.loss, built.batch)
    theta_D.requires_grad_()
    assert torch.allclose(differences(built).gradient_D, torch.autograd.grad(f(theta_D), theta_D)[0], atol=1e-14)


def test_parameters_keep_their_bits_their_storage_and_their_version() -> None:
    built = build(CASES[0])
    params = list(built.model.parameters())
    before = [(p.data_ptr(), p._version, p.detach().clone()) for p in params]

    def check() -> None:
        for p, (pointer, version, value) in zip(params, before, strict=True):
            assert (p.data_ptr(), p._version) == (pointer, version)
            assert torch.equal(p, value)
            assert p.grad is None

    operator = differences(built)
    kept_graph = built.model(built.batch[0]).sum()
    operator.matvec(torch.ones(operator.size, dtype=torch.float64))
    check()
    kept_graph.backward()  # a graph of the user's is still valid
    for p in params:
        p.grad = None

    def failing() -> Any:
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        FiniteDifferenceOperator([failing], Layout.of(built.model)).matvec(
            torch.ones(operator.size, dtype=torch.float64)
        )
    check()


def wide(activation: nn.Module) -> Built:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 64), activation, nn.Linear(64, 64), activation, nn.Linear(64, 3))
    return Built(model, nn.CrossEntropyLoss(), (torch.randn(64, 10), torch.randint(0, 3, (64,))))


@pytest.mark.parametrize("seed", range(3))
def test_estimated_error_bounds_the_error_in_single_precision(seed: int) -> None:
    built = wide(nn.Tanh())
    operator = differences(built)
    exact = HessianOperator(pieces(built), Layout.of(built.model), context=pinned)
    v_D = torch.randn(operator.size, generator=torch.Generator().manual_seed(seed))
    truth = exact.matvec(v_D)
    error = float((operator.matvec(v_D) - truth).norm() / truth.norm())
    assert error < 2 * operator.error(v_D)
    assert error < 0.01


def test_kinks_show_in_the_estimated_error() -> None:
    smooth, kinked = wide(nn.Tanh()), wide(nn.ReLU())
    v_D = torch.randn(Layout.of(smooth.model).size, generator=torch.Generator().manual_seed(0))
    assert differences(smooth).error(v_D) < 0.02
    assert differences(kinked).error(v_D) > 0.2


def test_step() -> None:
    built = build(CASES[0])
    assert default_step(Layout.of(built.model)) == pytest.approx(torch.finfo(torch.float64).eps ** (1 / 3))
    far = Layout(("far",), (nn.Parameter(torch.full((4,), 1e4)),))
    assert default_step(far) == pytest.approx(30 * torch.finfo(torch.float32).eps * 2e4)
    assert differences(built, step=1e-3).step == 1e-3
    assert "1.0e-03 (last resort)" in differences(built, step=1e-3).route
    half = nn.Linear(2, 2).bfloat16()
    with torch.no_grad():
        half.weight.zero_()
        half.bias.zero_()
    assert default_step(Layout.of(half)) == pytest.approx(torch.finfo(torch.bfloat16).eps ** (1 / 3))
