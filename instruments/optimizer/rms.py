"""How large the gradient is compared with what the second moment expects of it, layer by layer.

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
class Rms(Gauge):
    """RMS_t = sqrt(mean(g^2 / max(v_hat, eps^2))) of each parameter tensor, v_hat before it takes in this gradient.

    v_hat estimates E g^2 (`instruments.second_moments`), so that a gradient like those of the past reads 1 in whatever
    unit it is. Far above 1 the second moment is out of date: the gradient has grown within fewer steps than v_hat
    averages over, and the step is divided by too small a number. That came one to eight steps before loss spikes of
    large transformers, in the first layer; a smaller beta2 or a bound on the update mends it. Far below 1 gradients
    have shrunk, and the step is too short until v_hat has followed.

    Wortsman et al. take v_hat after this gradient, which bounds their RMS by 1 / sqrt(1 - beta2); here it is not
    bounded, and early in a run, when v_hat rests on few steps, it is noisy and large. Coordinates whose second moment
    is zero (never a gradient so far: rows of an embedding, units that were dead) have nothing to be compared with; they
    are left out and counted in `unheard`. The gradient is read at observe(): where it is clipped afterwards, v_hat has
    seen clipped ones only, and RMS is larger by about the inverse of the usual clip factor. Before the first step, and
    for tensors without gradient or second moment, it is NaN.
    """

    outputs: ClassVar[Mapping[str, Output]] = {
        "rms": Output("1", "RMS_t over all coordinates; 1 for a gradient like those of the past", edge=1.0),
        "largest": Output("1", "RMS_t of the tensor where it is largest; far above 1 foretells a spike", edge=1.0),
        "largest_layer": Output("layer", "which tensor that is, in the order of the layers, from 0"),
        "per_layer": Output("1", "RMS_t of each parameter tensor", "per-layer"),
        "unheard": Output("1", "share of coordinates left out: their second moment is zero"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"states"})
    reference: ClassVar[str] = (
        "Wortsman et al. 2023, Stable and low-precision training for large-scale vision-language models, section 3; "
        "Shazeer and Stern 2018, Adafactor, section 5"
    )

    def price(self, view: View) -> float:
        return 0.2

    def read(self, view: View) -> Values:
        layout = view.layout
        sums: dict[int, Tensor] = {}
        heard: dict[int, Tensor] = {}
        sizes = 0
        for found in second_moments(view.states, layout):
            if found.grad is not None:
                ratio, known = _ratio(found.grad, found.moment.v_hat, found.moment.eps)
                sums[found.place], heard[found.place] = ratio.sum(), torch.count_nonzero(known)
                sizes += known.numel()
        sums_L, heard_L = per_layer(layout, sums), per_layer(layout, heard)
        rms_L = (sums_L / heard_L).sqrt()
        largest, place = torch.where(heard_L > 0, rms_L, float("-inf")).max(0)
        some = heard_L.nansum()
        total = torch.where(heard_L > 0, sums_L, 0.0).sum()
        return {
            "rms": (total / some).sqrt(),
            "largest": torch.where(some > 0, largest, float("nan")),
            "largest_layer": torch.where(some > 0, place, float("nan")),
            "per_layer": rms_L,
            "unheard": 1 - some / sizes,
        }


def _ratio(grad: Tensor, v_hat: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """g^2 / max(v_hat, eps^2), 0 where v_hat is zero; and where it is not."""
    known = v_hat != 0
    return torch.where(known, grad.square() / v_hat.clamp(min=eps**2), 0.0), known
