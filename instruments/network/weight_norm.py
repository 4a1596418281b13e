"""Norm of the parameters, whole and by parameter tensor."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from instruments.instrument import Gauge, Output, Values
from instruments.view import Need, View


@dataclass(frozen=True)
class WeightNorm(Gauge):
    """|theta| over the trained parameters together, and |theta_l| of each parameter tensor in the order of the model.

    Weight norms that grow without end lower the effective learning rate of layers whose scale does not matter (those
    before a normalisation); norms that shrink under weight decay raise it.
    """

    outputs: ClassVar[Mapping[str, Output]] = {
        "weight_norm": Output("parameter", "Euclidean norm of all trained parameters together"),
        "per_layer": Output("parameter", "Euclidean norm of each parameter tensor", "per-layer"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"parameters"})
    reference: ClassVar[str] = "van Laarhoven 2017, L2 regularization versus batch and weight normalization, section 3"

    def price(self, view: View) -> float:
        return 0.0

    def read(self, view: View) -> Values:
        norms_L = view.parameter_norms
        return {"weight_norm": torch.linalg.vector_norm(norms_L), "per_layer": norms_L}
