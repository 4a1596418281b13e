"""What one optimizer step did to the loss of the batch that it was taken on.

Shapes: D = trainable scalars.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from instruments.probe import Probe


@dataclass(frozen=True)
class StepEffect:
    """`slope` is g'u, the change of the loss predicted to first order by the step u; `rounding` bounds the rounding
    error of `loss_after - loss_before`; all in the unit of the loss. `update_norm` is |u| in the unit of the
    parameters, `gradient_norm` is |g| of the recomputed gradient.
    """

    loss_before: float
    loss_after: float
    slope: float
    update_norm: float
    gradient_norm: float
    rounding: float


def step_effect(probe: "Probe", before: Sequence[Tensor]) -> StepEffect:
    """Loss and gradient at the old parameters, loss at the new ones: same batch, same masks, same mode.

    Costs one gradient and one forward. The gradient is recomputed because `.grad` may stand for other dropout masks, be
    clipped or scaled; where the training's own pass was watched, it was proved not to, and the forward is all.
    """
    if probe.samples.trained is not None:
        loss_before, g_D = probe.samples.trained
    else:
        with exchanged(probe.layout.params, before):
            loss_before, g_D, _ = probe.loss_and_gradient()
    loss_after = probe.loss_here()
    with torch.no_grad():
        u_D = probe.layout.join([p.detach() - p0 for p, p0 in zip(probe.layout.params, before, strict=True)])
    g_D, u_D = g_D.double(), u_D.double()
    slope, norms = torch.dot(g_D, u_D), (u_D.norm(), g_D.norm())
    f0, f1, slope_, u, g = torch.stack([loss_before.double(), loss_after.double(), slope, *norms]).tolist()
    eps = max(torch.finfo(p.dtype).eps for p in probe.layout.params)  # the losses are in their precision
    return StepEffect(f0, f1, slope_, u, g, eps * (abs(f0) + abs(f1)))


@contextmanager
def exchanged(params: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """The very parameters, whoever holds them, with other values for a while; then their own storage again."""
    own = [p.data for p in params]
    try:
        for p, value in zip(params, values, strict=True):
            p.data = value
        yield
    finally:
        for p, data in zip(params, own, strict=True):
            p.data = data
