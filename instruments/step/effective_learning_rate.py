"""The learning rate at which plain gradient descent would have gone as far, and how far the weights turned.

Shapes: L = trained parameter tensors, G = parameter groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from instruments.after_step import Groups, used_gradients
from instruments.instrument import Gauge, Output, Values
from instruments.layout import norms_of
from instruments.view import Need, View


@dataclass(frozen=True)
class EffectiveLearningRate(Gauge):
    """|u| / |g| of each parameter group, u the measured change and g the gradient that the optimizer used.

    Plain SGD with that learning rate would have moved as far; its own reads `multiple` = 1. Momentum mu in a steady
    direction reads 1 / (1 - mu), and a `multiple` of Adam is large where gradients are small. Decay and momentum are in
    u, clipping in place is in g, the scale of a GradScaler in neither.

    The angular update is |u_perp| / |theta|, u_perp being the part of u across the weights of a tensor before the step.
    Where a normalization follows, the length of the weights has no effect and only this part does: it is then the
    learning rate that matters. With decay lambda it settles near sqrt(2 eta lambda) for SGD, and near
    sqrt(2 eta lambda / (1 + mu)) with momentum mu. It means little for tensors without normalization, for biases and
    gains. A group without a gradient reads infinity where it moved (momentum, decay), NaN where it stood still; a group
    without a trained parameter reads NaN.
    """

    outputs: ClassVar[Mapping[str, Output]] = {
        "ratio": Output("parameter² / loss", "|u| / |g|, learning rate of a plain SGD step as long", "per-group"),
        "multiple": Output("1 or parameter / loss", "that ratio over the learning rate of the group", "per-group"),
        "angular": Output("1", "|u_perp| / |theta|, by tensor and then pooled over the group", "per-group"),
        "angular_per_layer": Output("1", "|u_perp| / |theta| of each parameter tensor", "per-layer"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"change", "gradient", "parameters", "groups"})
    reference: ClassVar[str] = (
        "angular update: Wan et al. 2021, Spherical motion dynamics; Kosson, Messmer and Jaggi 2024, Rotational "
        "equilibrium"
    )

    def price(self, view: View) -> float:
        return 0.2

    def read(self, view: View) -> Values:
        groups, changes = Groups.of(view), view.changes
        used_L, moved_L = norms_of(used_gradients(view)), norms_of(changes)
        before = torch._foreach_sub(view.parameters, changes)
        before_L = norms_of(before)
        across_L = norms_of([across(u, theta) for u, theta in zip(changes, before, strict=True)])

        def over_groups(norms_L: Tensor) -> Tensor:
            return groups.add(norms_L.square()).sqrt()

        ratio_G = over_groups(moved_L) / over_groups(used_L.to(moved_L))
        return {
            "ratio": ratio_G,
            "multiple": ratio_G / groups.rates(ratio_G),
            "angular": over_groups(across_L) / over_groups(before_L),
            "angular_per_layer": across_L / before_L,
        }


def across(u: Tensor, theta: Tensor) -> Tensor:
    """The part of u orthogonal to theta as one vector, u itself where theta is zero; in float32 at least."""
    u, theta = (t.float() if t.dtype.itemsize < 4 else t for t in (u, theta))
    square = theta.square().sum()
    share = torch.where(square > 0, (u * theta).sum() / square, 0.0)
    return u - share * theta
