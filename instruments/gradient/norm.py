"""Norm of the gradient that the optimizer is about to use."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from instruments.instrument import Gauge, Output, Values
from instruments.view import Need, View


@dataclass(frozen=True)
class Norm(Gauge):
    """|g|, the Euclidean norm of all `.grad` together as they stand at the reading, divided by the loss scale.

    Clipping that happens after the reading does not show here (a clip is an event of its own); NaN and infinity are
    values.
    """

    outputs: ClassVar[Mapping[str, Output]] = {
        "norm": Output("loss / parameter", "Euclidean norm of the gradient over all parameters"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"gradient"})
    reference: ClassVar[str] = "Goodfellow, Bengio and Courville 2016, Deep Learning, section 8.2.4"

    def price(self, view: View) -> float:
        return 0.0

    def read(self, view: View) -> Values:
        return {"norm": view.gradient_norm}
