"""The largest eigenvalue of the Hessian, followed along the run.

Shapes: D = trainable scalars.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from instruments.instrument import Instrument, Output, State, Values
from instruments.linalg.tracking import Track, follow
from instruments.operators.hessian import KEPT_PRODUCT
from instruments.view import Need, View


@dataclass(frozen=True)
class Sharpness(Instrument):
    """lambda_max of the Hessian of the training loss on the held probe batches, algebraically largest.

    From the last Ritz vector by corrections, until what a residual and the gaps to the eigenvalues below leave of error
    is at most 2.2 `tol`^2 |lambda|: 1 % by default. The next Ritz pairs are kept too, and looked at where one of them
    may have become the largest; a fresh start audits both, rarely while it finds nothing, at every reading while it
    does (`instruments.linalg.tracking`). The value is never above the true one by more than rounding. `bound` is the
    largest of the residual, of (1 + s/2) `tol` |lambda| at the s-th reading after an audit, and of what recent audits
    have found missing: the true value is that close, unless an eigenvalue nobody has seen has overtaken it by more.

    Sharpness of a mini-batch is larger than that of the whole data set: compare only readings on the same number of
    examples. `edge` is what it would have to reach for rho = 1 where that is one number: all coordinates stepping
    alike, as under SGD.
    """

    tol: float = 0.0675
    max_products: int = 40

    outputs: ClassVar[Mapping[str, Output]] = {
        "sharpness": Output("loss / parameter²", "largest eigenvalue of the Hessian on the probe batch"),
        "residual": Output("loss / parameter²", "|H y - lambda y| for the unit vector y of the reading"),
        "bound": Output("loss / parameter²", "the true value lies between the reading and the reading plus this"),
        "converged": Output("1", "1 when the residual met the tolerance, 0 when products ran out"),
        "edge": Output(
            "loss / parameter²", "sharpness at which this optimizer is unstable, 2/eta for SGD; NaN where none is"
        ),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"hessian", "preconditioner"})
    reference: ClassVar[str] = (
        "Lanczos: Parlett 1998, The symmetric eigenvalue problem, chapter 13; sharpness along training: Cohen et al. "
        "2021, Gradient descent on neural networks typically occurs at the edge of stability"
    )

    def price(self, view: View) -> float:
        return 1.0 + 3 * KEPT_PRODUCT

    def init(self) -> State:
        return Track().state()

    def advance(self, view: View, state: State) -> tuple[Values, State]:
        ritz, track = follow(
            view.hessian, Track(**state), view.gradient_D, tol=self.tol, max_products=self.max_products, seed=view.step
        )
        values: Values = {
            "sharpness": ritz.value,
            "residual": ritz.residual,
            "bound": ritz.bound(self.tol),
            "converged": float(ritz.converged),
            "edge": view.sharpness_edge,
        }
        return values, track.state()
