"""Curvature along the directions that training takes: the gradient, and the gradient as the optimizer scales it.

Shapes: D = trainable scalars.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from instruments.curvature._matrix import price_of
from instruments.instrument import Gauge, Output, Values
from instruments.operators.operator import Operator
from instruments.refusal import Refusal
from instruments.view import Need, View

NAN = float("nan")


@dataclass(frozen=True)
class Directional(Gauge):
    """d'Hd / |d|^2 on the held batches for d = g and d = Dg, g the gradient on the same batches; a product each.

    D is the optimizer's step size, coordinate by coordinate (`instruments.preconditioners`), for a gradient that
    alternates: eta / (1 + mu) under heavy ball. `ratio` is what curvature takes back of the first-order gain of the
    step -Dg,

        ratio = 1/2 (Dg)'H(Dg) / g'Dg,

    1 where the step gains nothing (the `step/step_ratio` of that step); it is rho in the direction of the gradient, and
    never above `curvature/preconditioned_sharpness`. Curvature along g far below the largest eigenvalue says that the
    gradient runs along the valley; near it, that training jumps from wall to wall. Negative: the loss falls off faster
    than linearly. One gradient of the whole held set is not that of a mini-batch: for the noise see
    `curvature/batch_sharpness`.

    The step actually taken, with momentum of the past, is another direction; its curvature is in `step/step_ratio`. A
    gradient of zero gives NaN, and so do `along_step` and `ratio` under an optimizer whose D is not known.
    """

    outputs: ClassVar[Mapping[str, Output]] = {
        "along_gradient": Output("loss / parameter²", "g'Hg / |g|^2, curvature along the gradient", edge=0.0),
        "along_step": Output("loss / parameter²", "curvature along Dg, the gradient scaled by the optimizer", edge=0.0),
        "ratio": Output("1", "share of the first-order gain of the step -Dg that curvature takes back", edge=1.0),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"hessian", "preconditioner"})
    reference: ClassVar[str] = (
        "Jastrzebski et al. 2019, On the relation between the sharpest directions of DNN loss and the SGD step length; "
        "Roulet et al. 2024, Stepping on the edge"
    )

    def price(self, view: View) -> float:
        return price_of("hessian", 2)

    def read(self, view: View) -> Values:
        operator, g_D = view.hessian, view.gradient_D
        values: dict[str, float | Tensor] = {
            "along_gradient": curvature(operator, g_D)[0],
            "along_step": NAN,
            "ratio": NAN,
        }
        try:
            step_D = view.preconditioner.times(g_D)
        except Refusal as refusal:
            view.meter.provenance["step"] = f"unknown: {refusal}"
            return values
        along, length_sq = curvature(operator, step_D)
        values["along_step"] = along
        values["ratio"] = along * length_sq / (2 * torch.dot(g_D, step_D))
        return values


def curvature(operator: Operator, d_D: Tensor) -> tuple[Tensor, Tensor]:
    """d'Ad / |d|^2 and |d|^2. The product is with d / |d|, which neither overflows nor underflows."""
    norm = d_D.norm()
    unit_D = d_D / norm
    return torch.dot(unit_D, operator.matvec(unit_D)), norm.square()
