"""Sharpness as the optimizer sees it, a pure number with its edge at 1 for every supported optimizer.

Shapes: D = trainable scalars, G = parameter groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from instruments.instrument import Instrument, Output, State, Values
from instruments.linalg.tracking import Track, follow
from instruments.operators.hessian import KEPT_PRODUCT
from instruments.preconditioners import Preconditioner, headroom
from instruments.view import Need, View


@dataclass(frozen=True)
class PreconditionedSharpness(Instrument):
    """rho = 1/2 lambda_max( D^1/2 (H + diag c) D^1/2 ),  D_i = eta_i F_i(-1) / (p_i (1 - omega_i/2)).

    D is the optimizer's own step size a coordinate, momentum, decay and parameter groups included
    (`instruments.preconditioners`): rho = lambda_max eta / 2 for gradient descent, sharpness over 38/eta for Adam at
    beta1 = 0.9. With p held fixed and positive curvature the iteration decays when rho < 1 and diverges when rho > 1;
    full-batch training hovers at 1, mini-batch training below. Same probe batches, stop and audit as `sharpness`.

    `group_mass` is the share of the eigenvector's squared length in each group: d log rho / d log eta_k, that is, which
    group's learning rate to cut. `headroom` = 1/rho: the factor by which all rates could grow before the edge.
    """

    tol: float = 0.0675
    max_products: int = 40

    outputs: ClassVar[Mapping[str, Output]] = {
        "rho": Output("1", "preconditioned sharpness over its edge", edge=1.0),
        "residual": Output("1", "residual of rho's eigenvector, as for sharpness"),
        "bound": Output("1", "the true rho lies between the reading and the reading plus this"),
        "converged": Output("1", "1 when the residual met the tolerance, 0 when products ran out"),
        "headroom": Output("1", "1/rho: factor by which the learning rates could grow before the edge", edge=1.0),
        "group_mass": Output("1", "share of the eigenvector in each parameter group", "per-group"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"hessian", "preconditioner"})
    reference: ClassVar[str] = (
        "Cohen et al. 2022, Adaptive gradient methods at the edge of stability, for Adam; "
        "the general form and its proof: docs/architecture.md"
    )

    def price(self, view: View) -> float:
        return 1.0 + 3 * KEPT_PRODUCT

    def init(self) -> State:
        return Track().state()

    def advance(self, view: View, state: State) -> tuple[Values, State]:
        preconditioner = view.preconditioner
        hint_D = preconditioner.scale_D.sqrt() * view.gradient_D
        ritz, track = follow(
            view.preconditioned, Track(**state), hint_D, tol=self.tol, max_products=self.max_products, seed=view.step
        )
        values: Values = {
            "rho": ritz.value,
            "residual": ritz.residual,
            "bound": ritz.bound(self.tol),
            "converged": float(ritz.converged),
            "headroom": headroom(ritz.value),
            "group_mass": self._mass(view, preconditioner, ritz.vector_D),
        }
        return values, track.state()

    @staticmethod
    def _mass(view: View, preconditioner: Preconditioner, y_D: torch.Tensor) -> torch.Tensor:
        """Squared length of the unit vector y in each of the G groups."""
        mass_G = torch.zeros(preconditioner.groups, dtype=torch.float64)
        pieces = torch.split(y_D.double().square(), [p.numel() for p in view.layout.params])
        sums = torch.stack([piece.sum() for piece in pieces]).cpu()
        for group, amount in zip(preconditioner.group_of, sums, strict=True):
            if group >= 0:
                mass_G[group] += amount
        return mass_G / mass_G.sum() if mass_G.sum() > 0 else mass_G
