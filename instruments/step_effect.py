"""What one optimizer step did to the loss of the batch that it was taken on.

Shapes: D = trainable scalars.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import functional_call

from instruments.objective import pooled_loss

if TYPE_CHECKING:
    from instruments.probe import Probe


@dataclass(frozen=True)
class StepEffect:
    """`slope` is g'u, the change of the loss predicted to first order by the step u; `rounding` bounds the rounding
    error of `loss_after - loss_before`; all in the unit of the loss. `update_norm` is |u| in the unit of the
    parameters.
    """

    loss_before: float
    loss_after: float
    slope: float
    update_norm: float
    rounding: float


def step_effect(probe: "Probe", before: Sequence[Tensor]) -> StepEffect:
    """Loss and gradient at the old parameters, loss at the new ones: same batch, same masks, same mode.

    Costs one gradient and one forward. The gradient is recomputed because `.grad` may stand for other dropout masks, be
    clipped or scaled.
    """
    old = [p.clone().requires_grad_() for p in before]
    values = dict(zip(probe.layout.names, old, strict=True))

    def call(*args: Any, **kwargs: Any) -> Any:
        return functional_call(probe.module, values, args, kwargs)

    with torch.enable_grad():
        loss_before = pooled_loss(probe.objective, [probe._parts(call, batch) for batch in probe.batches])
        g_D = probe.layout.join(torch.autograd.grad(loss_before, old, allow_unused=True))
    with torch.no_grad():
        loss_after = pooled_loss(probe.objective, [probe._parts(probe.module, batch) for batch in probe.batches])
        u_D = probe.layout.join([p.detach() - p0 for p, p0 in zip(probe.layout.params, before, strict=True)])
    slope, norm = torch.dot(g_D.double(), u_D.double()), u_D.norm().double()
    f0, f1, slope_, norm_ = torch.stack([loss_before.detach().double(), loss_after.double(), slope, norm]).tolist()
    eps = torch.finfo(probe.layout.dtype).eps
    return StepEffect(f0, f1, slope_, norm_, eps * (abs(f0) + abs(f1)))
