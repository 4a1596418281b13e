"""Whether the second moment still describes the gradient: over how many steps it averages, and how far it is off.

Shapes: L = trained parameter tensors, G = parameter groups, S = coordinates sampled.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from instruments.instrument import Gauge, Output, Values
from instruments.second_moments import per_layer, second_moments
from instruments.view import Need, View

FAR = 10.0


@dataclass(frozen=True)
class SecondMomentAge(Gauge):
    """g^2 / v_hat over the coordinates, v_hat before it takes in this gradient, and the memory behind v_hat.

    v_hat averages over (1 - beta2^t) / (1 - beta2) steps: t at first, in the end 1000 for beta2 = 0.999 (all t for
    Adagrad). A gradient that changes faster is divided by a number of the past. If gradients are noise that does not
    change, g^2 / v_hat is chi-squared with one degree of freedom: median 0.45, and 0.16 % of the coordinates above 10.
    A median well below says that gradients have shrunk (Adam's steps are then too short, for as many steps as v_hat
    averages over), or that most gradients come in rare bursts; a share above 10 well over 0.2 % that they have grown,
    or that v_hat rests on few steps. `optimizer/rms` is the mean of the same ratio, which single coordinates decide.

    Coordinates whose second moment is zero are left out, as they were never heard of. The gradient is read at
    observe(): clipping afterwards makes every ratio larger. The median is that of about `sample` coordinates, the same
    ones at every reading; it is off by 1 % where 2^16 are drawn from more. NaN before the first step.
    """

    sample: int = 2**16

    outputs: ClassVar[Mapping[str, Output]] = {
        "median_ratio": Output("1", "median of g^2 / v_hat over the coordinates; 0.45 for noise that does not change"),
        "far_share": Output("1", "share of coordinates with g^2 > 10 v_hat; 0.0016 for noise that does not change"),
        "far_share_per_layer": Output("1", "the same share in each parameter tensor", "per-layer"),
        "averaging_length": Output("steps", "over how many steps v_hat averages, by parameter group", "per-group"),
        "steps_taken": Output("steps", "steps that v_hat has taken in, by parameter group", "per-group"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"states", "groups"})
    reference: ClassVar[str] = (
        "Shazeer and Stern 2018, Adafactor, section 5 (out-of-date second moments); "
        "Molybog et al. 2023, A theory on Adam instability in large-scale machine learning"
    )

    def price(self, view: View) -> float:
        return 0.2

    def read(self, view: View) -> Values:
        layout = view.layout
        groups = sum(len(optimizer.param_groups) for optimizer in view.optimizers)
        length_G, steps_G = np.full(groups, np.nan), np.full(groups, np.nan)
        generator = torch.Generator().manual_seed(0)
        ratios: list[Tensor] = []
        far: dict[int, Tensor] = {}
        heard: dict[int, Tensor] = {}
        for found in second_moments(view.states, layout):
            length_G[found.group_number] = np.fmax(length_G[found.group_number], found.moment.length)
            steps_G[found.group_number] = np.fmax(steps_G[found.group_number], found.steps)
            if found.grad is None:
                continue
            square, v_hat = found.grad.square().flatten(), found.moment.v_hat.flatten()
            known = v_hat != 0
            far[found.place] = torch.count_nonzero(known & (square > FAR * v_hat))
            heard[found.place] = torch.count_nonzero(known)
            some = self._sampled(len(square), layout.size, generator).to(square.device)
            ratio = (square[some] / v_hat[some])[known[some]]
            ratios.append(ratio.to(device=layout.device, dtype=layout.dtype))
        ratio_S = torch.cat(ratios) if ratios else torch.empty(0)
        far_L, heard_L = per_layer(layout, far), per_layer(layout, heard)
        return {
            "median_ratio": ratio_S.median() if len(ratio_S) else float("nan"),
            "far_share": far_L.nansum() / heard_L.nansum(),
            "far_share_per_layer": far_L / heard_L,
            "averaging_length": length_G,
            "steps_taken": steps_G,
        }

    def _sampled(self, size: int, total: int, generator: torch.Generator) -> Tensor:
        """Places in a tensor of `size` of the `total` coordinates: all, or its share of the sample."""
        if total <= self.sample:
            return torch.arange(size)
        return torch.randint(size, (-(-self.sample * size // total),), generator=generator)
