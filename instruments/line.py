"""The loss along the step that the optimizer took, on the batch that it was taken on.

Shapes: N = examples of the step, D = trainable scalars.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from instruments.objective import losses_by_example
from instruments.step_effect import exchanged

if TYPE_CHECKING:
    from instruments.probe import Probe


@dataclass(frozen=True)
class StepExamples:
    """By example, in a unit in which their means are the loss and its slope: loss before and after the step u, and
    <g_i, u> at the old parameters."""

    before_N: Tensor
    after_N: Tensor
    slope_N: Tensor


def loss_at(probe: "Probe", before: Sequence[Tensor], scale: float) -> Tensor:
    """Loss of the step's batch at the old parameters plus `scale` times the step; one forward."""
    after = [p.data for p in probe.layout.params]
    there = torch._foreach_add(list(before), torch._foreach_sub(after, list(before)), alpha=scale)
    with exchanged(probe.layout.params, there):
        return probe.loss_here()


def step_examples(probe: "Probe", before: Sequence[Tensor]) -> StepExamples:
    """Both ends of the step by example: per-example statistics at the old parameters, a forward at the new ones.

    Where a pass before the step has kept its factors, they are the statistics.
    """
    after = [p.data for p in probe.layout.params]
    steps = torch._foreach_sub(after, list(before))
    after_N = losses_by_example(probe.parts_here())
    kept = probe.samples.kept
    if kept is not None and kept.losses_N is not None and kept.complete(probe.layout):
        return StepExamples(kept.losses_N, after_N, kept.along(probe.layout, steps))
    with exchanged(probe.layout.params, before):
        before_N = losses_by_example(probe.parts_here())
        slope_N = probe.samples.inner_products(probe.layout.join(steps))
    return StepExamples(before_N, after_N, slope_N)
