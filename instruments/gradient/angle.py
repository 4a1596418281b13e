"""Angle between the gradient and the one at the reading before.

Shapes: D = trainable scalars, L = trained parameter tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from instruments.gradient._tensors import cosines, require_gradient
from instruments.instrument import Instrument, Output, State, Values
from instruments.samples.problem import flat_pieces
from instruments.view import Need, View


@dataclass(frozen=True)
class Angle(Instrument):
    """cos = <g, g'> / (|g| |g'|) between the gradient in `.grad` now and at the last reading, `steps_apart` steps ago.

    Two independent batches at about the same parameters have a mean cosine of |G|^2 / E |g_B|^2 = 1/(1 + x),
    x = B_simple/B: near 0 it says no more than that batches are noise. Clearly negative values between successive
    steps are a bounce from wall to wall of a valley, and come with a step ratio near 1. The farther apart the readings,
    the more the parameters have moved, so compare only values with the same `steps_apart`; by layer, a mean over many
    readings is worth more than one.

    Costs a copy of the gradient, which is kept between readings and goes into checkpoints. The first reading, and the
    first after the set of trained parameters has changed, has nothing to compare with: NaN. So has a gradient that is
    zero or not finite, and the reading after it.
    """

    outputs: ClassVar[Mapping[str, Output]] = {
        "cosine": Output("1", "cosine between this gradient and the one read before", edge=0.0),
        "angle": Output("degrees", "the same as an angle: 0 aligned, 90 orthogonal, 180 opposed", edge=90.0),
        "per_layer": Output("1", "the cosine of each parameter tensor", "per-layer"),
        "steps_apart": Output("steps", "how many optimizer steps lie between the two gradients"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"gradient"})
    reference: ClassVar[str] = (
        "1/(1 + x): McCandlish et al. 2018, An empirical model of large-batch training, section 2.2"
    )

    def price(self, view: View) -> float:
        return 0.05

    def init(self) -> State:
        return {"previous_D": torch.zeros(0), "names": [], "step": 0}

    def advance(self, view: View, state: State) -> tuple[Values, State]:
        require_gradient(view.grads)
        layout = view.layout
        g_D = layout.join(view.grads).detach()
        previous_D, names = state["previous_D"], list(layout.names)
        if state["names"] == names and len(previous_D) == layout.size:
            cosine, cosine_L = cosines(flat_pieces(layout, g_D), flat_pieces(layout, previous_D.to(g_D)))
            apart = float(view.step - state["step"])
        else:
            cosine, cosine_L = g_D.new_tensor(torch.nan), g_D.new_full((len(names),), torch.nan)
            apart = float("nan")
        values: Values = {
            "cosine": cosine,
            "angle": cosine.clamp(-1, 1).arccos().rad2deg(),
            "per_layer": cosine_L,
            "steps_apart": apart,
        }
        return values, {"previous_D": g_D, "names": names, "step": view.step}
