"""The smallest eigenvalue of the Hessian: how far from convex the loss is here.

Shapes: D = trainable scalars.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from instruments.instrument import Instrument, Output, State, Values
from instruments.linalg.tracking import Track, follow
from instruments.operators.hessian import KEPT_PRODUCT
from instruments.operators.operator import Operator
from instruments.view import Need, View


@dataclass(frozen=True)
class Smallest(Instrument):
    """lambda_min of the Hessian of the training loss on the held batches, as minus the largest eigenvalue of -H.

    Negative curvature is the rule in training, small beside the sharpness; its size says how fast a saddle is left. The
    lower end of the spectrum is crowded, so products run out more often than at the top: the cap is low and `converged`
    says what became of it. The reading is never below the true value by more than rounding.
    """

    tol: float = 0.1
    max_products: int = 20

    outputs: ClassVar[Mapping[str, Output]] = {
        "smallest": Output("loss / parameter²", "smallest eigenvalue of the Hessian on the probe batch", edge=0.0),
        "residual": Output("loss / parameter²", "|H y - lambda y| for the unit vector y of the reading"),
        "bound": Output("loss / parameter²", "the true value lies between the reading and the reading minus this"),
        "converged": Output("1", "1 when the residual met the tolerance, 0 when products ran out"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"hessian"})
    reference: ClassVar[str] = "Ghorbani, Krishnan and Xiao 2019, An investigation into neural net optimization"

    def price(self, view: View) -> float:
        return 1.0 + 8 * KEPT_PRODUCT

    def init(self) -> State:
        return Track().state()

    def advance(self, view: View, state: State) -> tuple[Values, State]:
        operator = Negated(view.hessian)
        ritz, track = follow(
            operator, Track(**state), view.gradient_D, tol=self.tol, max_products=self.max_products, seed=view.step
        )
        return {
            "smallest": -ritz.value,
            "residual": ritz.residual,
            "bound": ritz.bound(self.tol),
            "converged": float(ritz.converged),
        }, track.state()


class Negated(Operator):
    """-A."""

    def __init__(self, operator: Operator) -> None:
        self._operator = operator
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device
        self.price, self.route = operator.price, operator.route

    def matvec(self, v_D: Tensor) -> Tensor:
        return -self._operator.matvec(v_D)

    def known(self) -> Sequence[tuple[Tensor, Tensor]]:
        return [(v_D, -image_D) for v_D, image_D in self._operator.known()]
