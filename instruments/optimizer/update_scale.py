"""How long the step is in units of the learning rate.

Shapes: L = trained parameter tensors, G = parameter groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from instruments.after_step import Groups
from instruments.instrument import Gauge, Output, Values
from instruments.layout import norms_of
from instruments.view import Need, View


@dataclass(frozen=True)
class UpdateScale(Gauge):
    """RMS(u) / lr and max |u_j| / lr of each parameter group, u the measured change.

    Adam divides by the root of the second moment, so that a coordinate moves by about lr: RMS(u) / lr is 1 where all
    gradients agree in sign, about sqrt((1 - beta1) / (1 + beta1)), 0.23 at beta1 = 0.9, where they are pure noise, and
    usually between 0.2 and 1. Below that eps (`optimizer/epsilon_share`) or gradients that shrink hold the step back;
    above, the second moment is out of date (`optimizer/rms`). A single coordinate may move by up to
    (1 - beta1) / sqrt(1 - beta2) = 3.2 lr at the defaults, when it has its first gradient for a long time. For SGD both
    values have the unit of a gradient: with neither momentum nor decay they are its RMS and its largest entry.

    Weight decay is part of u and adds lambda |theta| where it is decoupled. NaN for a group without a trained
    parameter, and where the learning rate and the step are zero.
    """

    outputs: ClassVar[Mapping[str, Output]] = {
        "rms": Output("1 (Adam) or loss / parameter", "RMS of the step over the learning rate", "per-group", edge=1.0),
        "largest": Output("1 (Adam) or loss / parameter", "largest entry of the step over the same", "per-group"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"change", "groups"})
    reference: ClassVar[str] = (
        "Kingma and Ba 2015, Adam, section 2.1; healthy range: Wortsman et al. 2024, Small-scale proxies for "
        "large-scale transformer training instabilities, section 3.4"
    )

    def price(self, view: View) -> float:
        return 0.1

    def read(self, view: View) -> Values:
        groups, changes, device = Groups.of(view), view.changes, view.layout.device
        size_G = groups.add(torch.tensor([float(u.numel()) for u in changes], device=device))
        square_G = groups.add(norms_of(changes).square())
        largest_L = torch.stack([_largest(u).to(device) for u in changes])
        rates_G = groups.rates(square_G)
        return {"rms": (square_G / size_G).sqrt() / rates_G, "largest": groups.largest(largest_L) / rates_G}


def _largest(u: Tensor) -> Tensor:
    """Largest size of an entry, zero where there is none."""
    return torch.stack(u.aminmax()).abs().max() if u.numel() else u.new_zeros(())
