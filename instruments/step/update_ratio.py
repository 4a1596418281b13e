"""How far a step goes, measured by the size of what it changes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from instruments.instrument import Gauge, Output, Values
from instruments.view import Need, View


@dataclass(frozen=True)
class UpdateRatio(Gauge):
    """|u| / |theta| of the step u that the optimizer took from theta, over all trained parameters and by tensor.

    u is the measured change, decay and momentum included, whatever the optimizer. Values around 1e-3 are usual; a layer
    at 1e-6 hardly learns, one at 1e-1 is rewritten in ten steps. A tensor that is zero and moves has the ratio
    infinity, one that is zero and stays NaN. Costs a copy of the parameters, taken only on steps where it is due.
    """

    outputs: ClassVar[Mapping[str, Output]] = {
        "update_ratio": Output("1", "length of the step over length of the parameters before it"),
        "update_norm": Output("parameter", "length of the step"),
        "per_layer": Output("1", "the same ratio for each parameter tensor", "per-layer"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"change"})
    reference: ClassVar[str] = "You, Gitman and Ginsburg 2017, Large batch training of convolutional networks"

    def price(self, view: View) -> float:
        return 0.05

    def read(self, view: View) -> Values:
        updates_L, weights_L = view.update_norms, view.norms_before
        update, weight = torch.linalg.vector_norm(updates_L), torch.linalg.vector_norm(weights_L)
        return {"update_ratio": update / weight, "update_norm": update, "per_layer": updates_L / weights_L}
