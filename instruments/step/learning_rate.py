"""The learning rate of every parameter group."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from instruments.instrument import Gauge, Output, Values
from instruments.refusal import Refusal
from instruments.view import Need, View


@dataclass(frozen=True)
class LearningRate(Gauge):
    """`lr` of each group of each optimizer, in order, as it stands when the step is about to be taken."""

    outputs: ClassVar[Mapping[str, Output]] = {
        "learning_rate": Output("parameter² / loss or parameter", "learning rate of each parameter group", "per-group"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"groups"})
    reference: ClassVar[str] = "the optimizer's own setting"

    def price(self, view: View) -> float:
        return 0.0

    def read(self, view: View) -> Values:
        groups = [group for optimizer in view.optimizers for group in optimizer.param_groups]
        if any("lr" not in group for group in groups):
            raise Refusal("a parameter group of the optimizer has no 'lr'.")
        return {"learning_rate": np.array([float(group["lr"]) for group in groups])}
