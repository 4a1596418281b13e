"""What a reading is billed for.

Shapes: D = trainable scalars.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from instruments.operators.operator import Operator


@dataclass
class Meter:
    """What one reading used, in gradients (forward + backward) and in Hessian-vector products."""

    gradients: float = 0.0
    products: int = 0
    provenance: dict[str, Any] = field(default_factory=dict)


class Counted(Operator):
    """An operator whose products are billed to one reading."""

    def __init__(self, operator: Operator, meter: Meter) -> None:
        self._operator, self._meter = operator, meter
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device
        self.price, self.route = operator.price, operator.route

    def matvec(self, v_D: Tensor) -> Tensor:
        self._meter.products += 1
        product_D = self._operator.matvec(v_D)
        self._meter.provenance["route"] = self._operator.route  # which may have changed on the way
        if (error := getattr(self._operator, "error", None)) is not None:
            self._meter.provenance["product_error"] = error
        return product_D

    def known(self) -> Sequence[tuple[Tensor, Tensor]]:
        return self._operator.known()
