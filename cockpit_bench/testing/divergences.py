"""Ways in which training goes wrong, from its second step on: who observes must see it through to the end."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from cockpit_bench.testing.training import Case, Training

FROM_STEP = 1
Meddle = Callable[[Training, int], object]


def nothing(training: Training, step: int) -> None:
    """The training as it is."""


@dataclass(frozen=True)
class Meddling:
    """What is done to a training before its forward, after its backward, to its batches, to the loss reported."""

    before: Meddle = nothing
    after: Meddle = nothing
    leaf: Callable[[Any], Any] | None = None
    reported: float | None = None

    def case(self, case: Case) -> Case:
        """The case with its batches spoilt from step `FROM_STEP` on."""
        leaf = self.leaf
        if leaf is None:
            return case
        first = FROM_STEP * case.accumulate
        return replace(case, batch=lambda i: case.batch(i) if i < first else tree_map(leaf, case.batch(i)))

    def loss(self, loss: Tensor, step: int) -> Tensor:
        """What is passed to observe."""
        return loss if self.reported is None or step < FROM_STEP else torch.full_like(loss, self.reported)


LEFT_ALONE = Meddling()


def _parameters(value: float) -> Meddle:
    """One element of the first trained parameter tensor."""

    @torch.no_grad()
    def meddle(training: Training, step: int) -> None:
        if step >= FROM_STEP:
            first = next(p for p in training.model.parameters() if p.requires_grad)
            first.view(-1)[0] = value

    return meddle


def _gradients(value: float) -> Meddle:
    def meddle(training: Training, step: int) -> None:
        if step >= FROM_STEP:
            grad: Any = next(p.grad for p in training.model.parameters() if p.grad is not None)
            grad.view(-1)[0] = value

    return meddle


def _inputs(value: float) -> Callable[[Any], Any]:
    """Every element of a batch that is a number with a fraction."""
    return lambda leaf: torch.full_like(leaf, value) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


@torch.no_grad()
def _explosion(training: Training, step: int) -> None:
    """All parameters many times as large at every step, past what float32 holds."""
    if step >= FROM_STEP:
        for p in training.model.parameters():
            p.mul_(1e15)


DIVERGENCES: Mapping[str, Meddling] = {
    "NaN in a parameter": Meddling(before=_parameters(math.nan)),
    "infinity in a parameter": Meddling(before=_parameters(math.inf)),
    "NaN in a gradient": Meddling(after=_gradients(math.nan)),
    "infinity in a gradient": Meddling(after=_gradients(-math.inf)),
    "NaN in the inputs": Meddling(leaf=_inputs(math.nan)),
    "infinity in the inputs": Meddling(leaf=_inputs(math.inf)),
    "NaN as the loss": Meddling(reported=math.nan),
    "explosion": Meddling(before=_explosion),
}
