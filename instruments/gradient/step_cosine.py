"""Does the step go where the gradient says?

Shapes: L = trained parameter tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from instruments.gradient._tensors import cosines, dense, require_gradient
from instruments.instrument import Gauge, Output, Values
from instruments.view import Need, View


@dataclass(frozen=True)
class StepCosine(Gauge):
    """c = <u, -g> / (|u| |g|) between the step u that was taken and minus the gradient g that the optimizer was handed.

    1 for plain SGD. Momentum, preconditioning and decay turn the step away: about 0.35 for Adam on a small network
    (0.27 to 0.53 over learning rates), about 0.8 for SGD with a weight decay that weighs as much as the gradient.
    Near 0 the step follows its memory and not the present gradient: a momentum near 1, noise, or a step in which
    updates are lost to rounding. Negative means that the optimizer climbs; a group with `maximize` does so on purpose.

    g is what stands in `.grad`, with whatever the loop did to it in place: clipping by norm and a loss scale leave c as
    it is. What went wrong before `.grad`, a loss with the wrong sign or gradients that were not zeroed, is in g as well
    as in u and does not show here. A tensor that did not move, or has no gradient, has c = NaN. Costs a copy of the
    parameters, taken only on steps where it is due.
    """

    outputs: ClassVar[Mapping[str, Output]] = {
        "cosine": Output("1", "cosine between the step and minus the gradient: 1 for SGD, below 0 uphill", edge=0.0),
        "per_layer": Output("1", "the same for each parameter tensor", "per-layer"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"change", "gradient"})
    reference: ClassVar[str] = "Nocedal and Wright 2006, Numerical optimization, eq. 3.12"

    def price(self, view: View) -> float:
        return 0.05

    def read(self, view: View) -> Values:
        require_gradient(view.grads)
        changes = view.changes
        grads = [torch.zeros_like(u) if g is None else dense(g) for g, u in zip(view.grads, changes, strict=True)]
        cosine, cosine_L = cosines(changes, grads)
        return {"cosine": -cosine, "per_layer": -cosine_L}
