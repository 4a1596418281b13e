"""Targets drawn from the distribution that a model and its loss stand for.

The elementwise loss of element e is c_e nll_e + a constant in the outputs, where nll_e is minus the log-likelihood of

    nn.CrossEntropyLoss     softmax(z_e)         c_e = sum of class weight times target probability, smoothing included
    nn.BCEWithLogitsLoss    sigmoid(z_e)         c_e = weight (1 + (pos_weight - 1) target)
    nn.MSELoss              Normal(z_e, 1)       c_e = 2

so that its second derivative by z_e is c_e times the Fisher information of that distribution.

Shapes: N = examples, C = classes, M = draws; a star stands for the further dimensions of the elements.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instruments.objective import Batch, Call, ModuleObjective, Objective
from instruments.refusal import Refusal


class Predictive(ABC):
    """Abstract: the distribution of a target given the outputs of the model."""

    @abstractmethod
    def fits(self, outputs: Tensor, targets: Tensor) -> bool:
        """Whether every element has a target and an output of its own."""

    @abstractmethod
    def draw(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """One target for each element."""

    @abstractmethod
    def nll(self, outputs: Tensor, drawn: Tensor) -> Tensor:
        """Minus the log-likelihood of each element, but for a constant."""

    @abstractmethod
    def coefficients(self, loss: Any, outputs: Tensor, targets: Tensor) -> Tensor:
        """c_e of each element, from the true targets."""


class Categorical(Predictive):
    """Classes in dimension 1: outputs (N, C, *), elements (N, *)."""

    def fits(self, outputs: Tensor, targets: Tensor) -> bool:
        elements = targets[:, 0] if targets.is_floating_point() else targets
        return outputs.ndim >= 2 and outputs[:, 0].shape == elements.shape

    def draw(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        p: Tensor = outputs.movedim(1, -1).double().softmax(-1)
        drawn: Tensor = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator)
        return drawn.view(p.shape[:-1])

    def nll(self, outputs: Tensor, drawn: Tensor) -> Tensor:
        return F.cross_entropy(outputs, drawn, reduction="none")

    def coefficients(self, loss: Any, outputs: Tensor, targets: Tensor) -> Tensor:
        ones_C = torch.ones(outputs.shape[1], dtype=outputs.dtype, device=outputs.device)
        weight_C = ones_C if loss.weight is None else loss.weight
        uniform = loss.label_smoothing * weight_C.mean()
        if targets.is_floating_point():  # class probabilities
            mass: Tensor = torch.einsum("nc...,c->n...", targets, weight_C) * (1 - loss.label_smoothing) + uniform
            return mass
        counted = targets != loss.ignore_index
        c: Tensor = ((1 - loss.label_smoothing) * weight_C[torch.where(counted, targets, 0)] + uniform) * counted
        return c


class Bernoulli(Predictive):
    """One logit an element."""

    def fits(self, outputs: Tensor, targets: Tensor) -> bool:
        return outputs.shape == targets.shape and outputs.ndim > 0

    def draw(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        return torch.bernoulli(outputs.double().sigmoid(), generator=generator).to(outputs)

    def nll(self, outputs: Tensor, drawn: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, drawn, reduction="none")

    def coefficients(self, loss: Any, outputs: Tensor, targets: Tensor) -> Tensor:
        c = torch.ones_like(outputs) if loss.pos_weight is None else 1 + (loss.pos_weight - 1) * targets
        return c if loss.weight is None else c * loss.weight


class UnitNormal(Predictive):
    """One mean an element, unit variance."""

    def fits(self, outputs: Tensor, targets: Tensor) -> bool:
        return outputs.shape == targets.shape and outputs.ndim > 0

    def draw(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype, device=outputs.device)
        return outputs + noise

    def nll(self, outputs: Tensor, drawn: Tensor) -> Tensor:
        return (outputs - drawn).square() / 2

    def coefficients(self, loss: Any, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.full_like(outputs, 2.0)


KNOWN: dict[type[nn.Module], Predictive] = {
    nn.CrossEntropyLoss: Categorical(),
    nn.BCEWithLogitsLoss: Bernoulli(),
    nn.MSELoss: UnitNormal(),
}


class DrawnTargets:
    """The targets of one batch, drawn M times at its first evaluation and then held."""

    def __init__(self, objective: Objective, batch: Batch, *, seed: int, stream: int, draws: int) -> None:
        if draws < 1:
            raise ValueError(f"expected at least one draw, got {draws}.")
        self._objective, self._batch, self._draws = objective, batch, draws
        self._loss, self._predictive = _predictive(objective)
        self._seed = (seed << 20) + stream  # a stream of its own for every batch
        self._drawn: Tensor | None = None

    def evaluate(self, module: Call) -> tuple[Tensor, Tensor | float]:
        """sums_MN of sqrt(c_e) nll_e over the elements of each example, with a graph; the denominator of the loss."""
        seen: list[Any] = []

        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(module(*args, **kwargs))
            return seen[-1]

        parts = self._objective.parts(call, self._batch)
        outputs, targets = seen[0], self._batch[1]
        if parts.sums_N is None or not self._predictive.fits(outputs, targets):
            raise Refusal(
                f"targets of shape {tuple(targets.shape)} do not match outputs of shape {tuple(outputs.shape)} element "
                "by element, so it is not clear what to draw; give both a leading dimension of examples."
            )
        roots = self._predictive.coefficients(self._loss, outputs, targets).detach().sqrt()
        if self._drawn is None:
            generator = torch.Generator(outputs.device).manual_seed(self._seed)
            draws = [self._predictive.draw(outputs.detach(), generator) for _ in range(self._draws)]
            self._drawn = torch.cat(draws)
        repeated = outputs.expand(self._draws, *outputs.shape).flatten(0, 1)
        scores = roots * self._predictive.nll(repeated, self._drawn).view(self._draws, *roots.shape)
        return scores.reshape(self._draws, roots.shape[0], -1).sum(2), parts.denominator


def _predictive(objective: Objective) -> tuple[nn.Module, Predictive]:
    loss = objective._module if isinstance(objective, ModuleObjective) else None
    if loss is None or type(loss) not in KNOWN:
        known = ", ".join(cls.__name__ for cls in KNOWN)
        what = "a loss function" if loss is None else type(loss).__name__
        raise Refusal(
            f"the distribution that {what} stands for is not known (known: {known}), so no targets can be drawn; "
            "use the Gauss-Newton matrix or the empirical Fisher."
        )
    return loss, KNOWN[type(loss)]
