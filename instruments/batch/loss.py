"""The training loss of the step's own batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from instruments.instrument import Gauge, Output, Values
from instruments.view import Need, View


@dataclass(frozen=True)
class Loss(Gauge):
    """The loss that was given to `observe`, or, if none was, the loss recomputed on the batch (and labelled so)."""

    outputs: ClassVar[Mapping[str, Output]] = {"loss": Output("loss", "training loss of the step's batch")}
    needs: ClassVar[frozenset[Need]] = frozenset({"loss"})
    reference: ClassVar[str] = "the training loss"

    def price(self, view: View) -> float:
        return 0.0 if view.loss_given else 1 / 3

    def read(self, view: View) -> Values:
        return {"loss": view.loss}
