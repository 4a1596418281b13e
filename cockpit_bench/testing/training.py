"""A small training problem as data, and one way to train it: with or without somebody who observes."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn, optim

SEED = 7
Observe = Callable[[Any, Tensor], object]


def sgd(model: nn.Module) -> Sequence[Any]:
    return [optim.SGD(model.parameters(), lr=0.1, momentum=0.9)]


@dataclass(frozen=True)
class Case:
    """One training problem: everything in it is made anew for every run, from the seed.

    `loss` is what a `Cockpit` is given: a loss module on (inputs, targets), or `losses(call, batch) -> losses_N`.
    `batch` gives the batch of a micro-step by its number; `accumulate` of them make one step. `clip` is the
    norm to which gradients are clipped just before the step.
    """

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    optimizers: Callable[[nn.Module], Sequence[Any]] = sgd
    loss: Any = field(default_factory=nn.CrossEntropyLoss)
    accumulate: int = 1
    clip: float | None = None


class Training:
    """A case being trained: `backward` stands for the user's forward and backward, `take_step` for the rest."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(SEED)
        np.random.seed(SEED)
        random.seed(SEED)
        self.case, self.model = case, case.model()
        self.optimizers = case.optimizers(self.model)
        self.losses: list[float] = []

    def loss(self, batch: Any) -> Tensor:
        """The loss of one micro-batch, divided so that those of a step add up to their mean."""
        if isinstance(self.case.loss, nn.Module):
            loss: Tensor = self.case.loss(self.model(batch[0]), batch[1])
        else:
            loss = self.case.loss(self.model, batch).mean()
        return loss / self.case.accumulate

    def backward(self, step: int, micro: int = 0) -> tuple[Any, Tensor]:
        """Forward and backward of one micro-batch; the batch and its loss."""
        batch = self.case.batch(step * self.case.accumulate + micro)
        loss = self.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        self.losses.append(loss.item())
        return batch, loss

    def take_step(self) -> None:
        if self.case.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.case.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def run(self, steps: int, observe: Observe = lambda batch, loss: None) -> "Training":
        for step in range(steps):
            for micro in range(self.case.accumulate):
                observe(*self.backward(step, micro))
            self.take_step()
        return self

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint of this training holds; of random numbers torch's own alone."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["random"])
