"""Ways in which training goes wrong, from its second step on: who observes must see it through to the end."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from cockpit_bench.testing.runs import Meddle, nothing
from cockpit_bench.testing.training import Training

FROM_STEP = 1


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


@torch.no_grad()
def _explosion(training: Training, step: int) -> None:
    """All parameters a thousand times as large at every step, past what float32 holds."""
    if step >= FROM_STEP:
        for p in training.model.parameters():
            p.mul_(1e15)


DIVERGENCES: Mapping[str, tuple[Meddle, Meddle]] = {
    "NaN in a parameter": (_parameters(math.nan), nothing),
    "infinity in a parameter": (_parameters(math.inf), nothing),
    "NaN in a gradient": (nothing, _gradients(math.nan)),
    "infinity in a gradient": (nothing, _gradients(-math.inf)),
    "explosion": (_explosion, nothing),
}
"""By name, what is done before the forward and after the backward of every step."""
