"""The ground truth itself: closed forms against autograd in float64 and against what samples show."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, vmap

from workloads.data.noisy_quadratic import bowl, examples
from workloads.quadratic import (
    START_NORM,
    Quadratic,
    evaluate,
    excess_loss,
    gradient,
    gradient_covariance,
    losses,
)
from workloads.quadratic import hessian as closed_hessian


@pytest.fixture
def model() -> Quadratic:
    torch.manual_seed(3)
    return Quadratic(bowl()).double()


@pytest.fixture(scope="module")
def x_ND() -> Tensor:
    return examples().train[0].double()


def mean_loss(model: Quadratic, theta_D: Tensor, x_ND: Tensor) -> Tensor:
    out: Tensor = functional_call(model, {"theta_D": theta_D}, (x_ND,))
    return out.mean()


def test_losses_are_the_formula(model: Quadratic, x_ND: Tensor) -> None:
    theta_D, A_DD = model.theta_D.detach(), model.A_DD
    slow_N = torch.stack([(theta_D - x_D) @ A_DD @ (theta_D - x_D) / 2 for x_D in x_ND[:20]])
    torch.testing.assert_close(losses(model, (x_ND[:20],)).detach(), slow_N)


def test_hessian_is_that_of_autograd(model: Quadratic, x_ND: Tensor) -> None:
    found_DD = hessian(lambda theta_D: mean_loss(model, theta_D, x_ND[:8]))(model.theta_D.detach())
    torch.testing.assert_close(closed_hessian(model), found_DD)


def test_gradient_of_the_examples_is_that_of_autograd(model: Quadratic, x_ND: Tensor) -> None:
    found_D = grad(lambda theta_D: mean_loss(model, theta_D, x_ND))(model.theta_D.detach())
    torch.testing.assert_close(gradient(model, x_ND), found_D)


def test_gradient_of_the_population_is_that_of_the_excess_loss(model: Quadratic) -> None:
    found_D = grad(lambda theta_D: mean_loss(model, theta_D, model.mean_D[None]))(model.theta_D.detach())
    torch.testing.assert_close(gradient(model), found_D)


def test_covariance_of_the_examples_is_that_of_their_gradients(model: Quadratic, x_ND: Tensor) -> None:
    of_one = grad(lambda theta_D, x_D: mean_loss(model, theta_D, x_D[None]))
    grads_ND = vmap(of_one, (None, 0))(model.theta_D.detach(), x_ND)
    deviations_ND = grads_ND - grads_ND.mean(0)
    found_DD = deviations_ND.T @ deviations_ND / len(x_ND)
    torch.testing.assert_close(gradient_covariance(model, x_ND), found_DD)


def test_covariance_of_the_population_is_what_many_samples_show(model: Quadratic) -> None:
    # With n Gaussian samples the entry ij of a sample covariance C has variance (C_ij^2 + C_ii C_jj) / (n - 1).
    num_samples = 20_000
    root_DD = torch.linalg.cholesky(model.S_DD)
    noise_ND = torch.randn(num_samples, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grads_ND = (model.theta_D.detach() - model.mean_D - noise_ND @ root_DD.T) @ model.A_DD
    truth_DD = gradient_covariance(model)
    variances_DD = (truth_DD**2 + torch.outer(truth_DD.diag(), truth_DD.diag())) / (num_samples - 1)
    scores_DD = (torch.cov(grads_ND.T) - truth_DD) / variances_DD.sqrt()
    assert scores_DD.abs().max() < 6
    assert 0.9 < scores_DD.square().mean() < 1.1


def test_the_training_examples_come_from_the_population(model: Quadratic, x_ND: Tensor) -> None:
    errors_D = (x_ND.mean(0) - model.mean_D) / (model.S_DD.diag() / len(x_ND)).sqrt()
    assert errors_D.abs().max() < 5
    truth_DD, found_DD = model.S_DD, torch.cov(x_ND.T)
    variances_DD = (truth_DD**2 + torch.outer(truth_DD.diag(), truth_DD.diag())) / (len(x_ND) - 1)
    assert ((found_DD - truth_DD) / variances_DD.sqrt()).abs().max() < 6


def test_the_spectrum_is_the_announced_one_and_the_bases_differ(model: Quadratic) -> None:
    eigenvalues_D = torch.linalg.eigvalsh(model.A_DD)
    assert ((eigenvalues_D > 0) & (eigenvalues_D < 1)).sum() == 90
    assert ((eigenvalues_D > 30) & (eigenvalues_D < 60)).sum() == 10
    noise_D = torch.linalg.eigvalsh(model.S_DD)
    assert noise_D.min() >= 0.1
    assert noise_D.max() <= 1.9
    assert (model.A_DD @ model.S_DD - model.S_DD @ model.A_DD).norm() > 0.1 * (model.A_DD @ model.S_DD).norm()
    assert all(np.array_equal(matrix_DD, matrix_DD.T) for matrix_DD in (bowl().curvature_DD, bowl().covariance_DD))


def test_excess_is_relative_to_the_start(model: Quadratic) -> None:
    valid = tuple(tensor.double() for tensor in examples().valid)
    assert model.theta_D.detach().norm().item() == pytest.approx(START_NORM, rel=1e-6)
    assert evaluate(model, valid)["valid_excess_loss"] == pytest.approx(1.0, rel=1e-5)
    with torch.no_grad():
        model.theta_D.copy_(model.mean_D + 0.1 * (model.theta_D - model.mean_D))
    assert evaluate(model, valid)["valid_excess_loss"] == pytest.approx(0.01, rel=1e-5)


def test_population_loss_is_excess_plus_half_the_trace(model: Quadratic, x_ND: Tensor) -> None:
    losses_N = losses(model, (x_ND,)).detach()
    expected = excess_loss(model) + torch.trace(model.A_DD @ model.S_DD) / 2
    assert (losses_N.mean() - expected).abs() < 5 * losses_N.std() / len(x_ND) ** 0.5
