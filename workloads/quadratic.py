"""Noisy quadratic in 100 dimensions with known Hessian, gradient and gradient covariance.

The loss of example x at parameters theta is 1/2 (theta - x)' A (theta - x). So the Hessian is A for every example and
everywhere, the gradient is A (theta - x), and all that instruments estimate has a closed form to be checked against.

Legend: N examples, D = 100 dimensions.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from workloads.data.noisy_quadratic import Bowl, bowl, examples
from workloads.evaluation import evaluating
from workloads.target import at_most
from workloads.workload import Workload

START_NORM = 10.0
TARGET = 1e-2


class Quadratic(nn.Module):
    """Parameters theta_D in a bowl; the forward pass gives the losses of the examples themselves.

    theta_D starts in a uniformly random direction, START_NORM from the origin. Buffers: the curvature A_DD, mean
    mean_D and covariance S_DD of the examples, and `start_excess`, the excess loss at the start.
    """

    A_DD: Tensor
    S_DD: Tensor
    mean_D: Tensor
    start_excess: Tensor

    def __init__(self, truth: Bowl) -> None:
        super().__init__()
        self.register_buffer("A_DD", torch.tensor(truth.curvature_DD, dtype=torch.float32))
        self.register_buffer("S_DD", torch.tensor(truth.covariance_DD, dtype=torch.float32))
        self.register_buffer("mean_D", torch.tensor(truth.mean_D, dtype=torch.float32))
        direction_D = torch.randn_like(self.mean_D)
        self.theta_D = nn.Parameter(START_NORM * direction_D / direction_D.norm())
        self.register_buffer("start_excess", excess_loss(self))

    def forward(self, x_ND: Tensor) -> Tensor:
        """losses_N."""
        return _half_square(self.theta_D - x_ND, self.A_DD)


def hessian(model: Quadratic) -> Tensor:
    """H_DD = A: of every example, of every batch, of the population, at every theta."""
    return model.A_DD


def gradient(model: Quadratic, x_ND: Tensor | None = None) -> Tensor:
    """g_D = A (theta - m), the gradient of the mean loss.

    Without examples m is the mean of the population; with x_ND it is their mean, and the value is exact for them.
    """
    m_D = model.mean_D if x_ND is None else x_ND.mean(0)
    return model.A_DD @ (model.theta_D.detach() - m_D)


def gradient_covariance(model: Quadratic, x_ND: Tensor | None = None) -> Tensor:
    """Covariance_DD = A S A of the gradient of one example drawn at random; the same at every theta.

    Without examples S is the covariance of the population. With x_ND it is their covariance with divisor N, which is
    exact for one of these N drawn uniformly; times N/(N - 1) it estimates the population's without bias. The mean
    gradient of B examples has 1/B of it when they are drawn with replacement, and (N - B)/(N - 1)/B of it when they
    are one batch of a shuffled epoch.
    """
    S_DD = model.S_DD if x_ND is None else torch.cov(x_ND.T, correction=0)
    return model.A_DD @ S_DD @ model.A_DD


def excess_loss(model: Quadratic) -> Tensor:
    """1/2 (theta - mean)' A (theta - mean): the population's mean loss above its minimum, which is tr(A S)/2."""
    return _half_square(model.theta_D.detach() - model.mean_D, model.A_DD)


def losses(call: Callable[..., Tensor], batch: tuple[Tensor, ...]) -> Tensor:
    """losses_N of a batch (x_ND,)."""
    return call(*batch)


def evaluate(model: nn.Module, valid: tuple[Tensor, ...]) -> dict[str, float]:
    """`valid_excess_loss`, 1 at the start and 0 at the optimum, without noise; `valid_loss`, the mean over x_ND."""
    assert isinstance(model, Quadratic)
    with evaluating(model):
        relative = excess_loss(model) / model.start_excess
        return {"valid_excess_loss": relative.item(), "valid_loss": model(*valid).mean().item()}


def _half_square(residual_ND: Tensor, A_DD: Tensor) -> Tensor:
    return ((residual_ND @ A_DD) * residual_ND).sum(-1) / 2


WORKLOAD = Workload(
    name="quadratic",
    summary="Noisy quadratic in 100 dimensions with known Hessian, gradient and gradient covariance.",
    load=examples,
    make_model=lambda data: Quadratic(bowl()),
    loss=losses,
    evaluate=evaluate,
    target=lambda data: at_most("valid_excess_loss", TARGET),
    batch_size=128,
    steps=200,
    evaluate_every=5,
    baselines={
        "sgd": {"lr": 0.025},
        "momentum": {"lr": 0.007, "momentum": 0.9},
        "nesterov": {"lr": 0.01, "momentum": 0.9},
        "adam": {"lr": 0.2},
        "adamw": {"lr": 0.2, "weight_decay": 0.01},
        "rmsprop": {"lr": 0.05},
    },
)
