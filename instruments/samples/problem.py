"""What an engine of per-example gradients is given, and what it gives back.

Shapes: N = examples of one batch, D = trainable scalars.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor, nn

from instruments.layout import Layout
from instruments.objective import Batch, Objective


@dataclass(frozen=True)
class SampleProblem:
    """A model at rest, its loss, and `running`: the pinned context in which every forward happens."""

    module: nn.Module
    layout: Layout
    objective: Objective
    running: Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class BatchMoments:
    """Of one batch, in the unit of `total` (the sum over examples), before division by `denominator`."""

    norms_sq_N: Tensor
    sum_D: Tensor
    denominator: Tensor | float


Engine = Callable[[SampleProblem, Batch], BatchMoments]
