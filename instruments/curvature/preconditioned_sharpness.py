"""Sharpness as the optimizer sees it, a pure number with its edge at 1 for every supported optimizer.

Shapes: D = trainable scalars, G = parameter groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from instruments.instrument import Instrument, Output, State, Values
from instruments.linalg.lanczos import Ritz
from instruments.linalg.tracking import Track, follow
from instruments.operators.hessian import KEPT_PRODUCT
from instruments.preconditioners import Preconditioner, headroom
from instruments.view import Need, View

CLIP_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_ has it


@dataclass(frozen=True)
class PreconditionedSharpness(Instrument):
    """rho = 1/2 lambda_max( D^1/2 (H + diag c) D^1/2 ),  D_i = eta_i F_i(-1) / (p_i (1 - omega_i/2)).

    D is the optimizer's own step size a coordinate, momentum, decay and parameter groups included
    (`instruments.preconditioners`): rho = lambda_max eta / 2 for gradient descent, sharpness over 38/eta for Adam at
    beta1 = 0.9. With p held fixed and positive curvature the iteration decays when rho < 1 and diverges when rho > 1;
    full-batch training hovers at 1, mini-batch training below. Same probe batches, stop and audit as `sharpness`.
    Where D is no diagonal (Shampoo), D^1/2 is any R with R R' = D, and D^1/2 y below is R y.

    Coordinates whose second moment is zero, this gradient included, do not move: units that have never fired, rows of
    an embedding never looked up, layers behind one that began at zero. The p of an Adam is nothing but eps there, which
    would make the curvature that an example of the probe batches finds in them look like an edge passed a hundred
    times. They are left out (D = 0) and counted in `unheard`; at the first gradient that reaches them they come back.
    Coupled weight decay reaches all of them.

    `group_mass` is the share of the eigenvector's squared length in each group: d log rho / d log eta_k, that is, which
    group's learning rate to cut. `headroom` = 1/rho: the factor by which all rates could grow before the edge.

    A gradient that is clipped by norm between observe() and the step moves the optimizer less than rho says. With
    `clip`, the max_norm of that clipping, `rho_clipped` is rho of the step as it is taken, with the share
    s = clip / |g| held fixed: s H in place of H, and p as the clipped gradient leaves it (s rho for SGD without coupled
    decay, at no product). Without `clip` it is rho; the event `clip` in the log has both norms. `headroom` and
    `group_mass` are those of rho.
    """

    tol: float = 0.0675
    max_products: int = 40
    clip: float | None = None

    outputs: ClassVar[Mapping[str, Output]] = {
        "rho": Output("1", "preconditioned sharpness over its edge", edge=1.0),
        "rho_clipped": Output("1", "rho of the gradient as clipping shortens it at this step", edge=1.0),
        "residual": Output("1", "residual of rho's eigenvector, as for sharpness"),
        "bound": Output("1", "the true rho lies between the reading and the reading plus this"),
        "converged": Output("1", "1 when the residual met the tolerance, 0 when products ran out"),
        "headroom": Output("1", "1/rho: factor by which the learning rates could grow before the edge", edge=1.0),
        "group_mass": Output("1", "share of the eigenvector in each parameter group", "per-group"),
        "unheard": Output("1", "share of coordinates left out: their second moment is zero, without a gradient"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"hessian", "preconditioner"})
    reference: ClassVar[str] = (
        "Cohen et al. 2022, Adaptive gradient methods at the edge of stability, for Adam; "
        "the general form and its proof: docs/architecture.md"
    )

    def __post_init__(self) -> None:
        if self.clip is None:
            return
        if not self.clip > 0:
            raise ValueError(f"expected clip to be the norm, above 0, that gradients are clipped to, got {self.clip}.")
        object.__setattr__(self, "needs", self.needs | {"gradient"})

    def price(self, view: View) -> float:
        return 1.0 + 3 * KEPT_PRODUCT

    def init(self) -> State:
        return Track().state()

    def advance(self, view: View, state: State) -> tuple[Values, State]:
        preconditioner = view.preconditioner
        hint_D = preconditioner.root_times(view.gradient_D)
        ritz, track = follow(
            view.preconditioned, Track(**state), hint_D, tol=self.tol, max_products=self.max_products, seed=view.step
        )
        values: Values = {
            "rho": ritz.value,
            "rho_clipped": self._clipped(view, ritz, hint_D),
            "residual": ritz.residual,
            "bound": ritz.bound(self.tol),
            "converged": float(ritz.converged),
            "headroom": headroom(ritz.value),
            "group_mass": self._mass(view, preconditioner, ritz.vector_D),
            "unheard": preconditioner.unheard,
        }
        return values, track.state()

    def _clipped(self, view: View, unclipped: Ritz, hint_D: Tensor) -> float:
        """rho of the shortened gradient, by a few more products from the vector just found."""
        if self.clip is None:
            return unclipped.value
        kept = self.clip / (float(view.gradient_norm) + CLIP_EPS)
        if not 0 < kept < 1:  # nothing to clip, or a gradient that is not finite
            view.meter.provenance["clipped"] = f"no, the norm is within {self.clip:g}"
            return unclipped.value
        view.meter.provenance["clipped"] = f"rho_clipped: by {kept:.4g}, to {self.clip:g}"
        start = Track(1, (unclipped.value,), unclipped.vector_D[None], period=2)
        ritz, _ = follow(
            view.clipped_preconditioned(kept), start, hint_D, tol=self.tol, max_products=self.max_products,
            seed=view.step,
        )  # fmt: skip
        return ritz.value

    @staticmethod
    def _mass(view: View, preconditioner: Preconditioner, y_D: Tensor) -> Tensor:
        """Squared length of the unit vector y in each of the G groups."""
        mass_G = torch.zeros(preconditioner.groups, dtype=torch.float64)
        pieces = torch.split(y_D.double().square(), [p.numel() for p in view.layout.params])
        sums = torch.stack([piece.sum() for piece in pieces]).cpu()
        for group, amount in zip(preconditioner.group_of, sums, strict=True):
            if group >= 0:
                mass_G[group] += amount
        return mass_G / mass_G.sum() if mass_G.sum() > 0 else mass_G
