"""How much of the model is stepped by eps instead of by its second moment.

Shapes: L = trained parameter tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from instruments.instrument import Gauge, Output, Values
from instruments.second_moments import per_layer, second_moments
from instruments.view import Need, View


@dataclass(frozen=True)
class EpsilonShare(Gauge):
    """Share of coordinates with sqrt(v) < eps, the sum of which the optimizer divides by.

    There eps is the larger summand, and an adaptive optimizer behaves as SGD with the learning rate lr / eps: steps are
    no longer of the size lr, they shrink with the gradient. The gradients of large transformers come down to eps = 1e-8
    as the model grows, those of any model may at the end of training. Compared is what the optimizer itself adds
    (`instruments.second_moments`): the corrected v_hat for Adam, AdamW and NAdam, the uncorrected averages for RAdam,
    RMSprop and Adadelta, the plain sum for Adagrad, the largest discounted |g| for Adamax.

    `silent` are coordinates whose second moment is zero, which never had a gradient. They are part of the share and
    harmless: a dead unit, an unused row, is no fault of eps. The state is that before this step; NaN before the first.
    """

    outputs: ClassVar[Mapping[str, Output]] = {
        "share": Output("1", "share of coordinates whose divisor is mostly eps, silent ones included"),
        "silent": Output("1", "share of coordinates that never had a gradient"),
        "per_layer": Output("1", "the share in each parameter tensor", "per-layer"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"states"})
    reference: ClassVar[str] = (
        "Wortsman et al. 2024, Small-scale proxies for large-scale transformer training instabilities, section 3.4"
    )

    def price(self, view: View) -> float:
        return 0.1

    def read(self, view: View) -> Values:
        layout = view.layout
        below: dict[int, Tensor] = {}
        silent: dict[int, Tensor] = {}
        for found in second_moments(view.states, layout):
            moment = found.moment
            below[found.place] = torch.count_nonzero(moment.square < moment.eps**2)
            silent[found.place] = torch.count_nonzero(moment.v_hat == 0)
        sizes_L = torch.tensor([p.numel() for p in layout.params], device=layout.device)
        below_L, silent_L = per_layer(layout, below), per_layer(layout, silent)
        size = sizes_L[~below_L.isnan()].sum()
        return {
            "share": below_L.nansum() / size,
            "silent": silent_L.nansum() / size,
            "per_layer": below_L / sizes_L,
        }
