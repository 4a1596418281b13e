"""Unit balls of the norms that optimizers by signs or orthogonal matrices step in; a search for the sharpest corner.

Shapes: D = trainable scalars.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from instruments.layout import Layout
from instruments.operators.operator import Operator

Norm = Literal["max", "spectral"]


@dataclass(frozen=True)
class UnitBall:
    """{d: |d| <= 1}: of the largest entry ("max"), or of the largest singular value of each matrix ("spectral").

    Under "spectral" a tensor of more dimensions is the matrix of its first one against the rest, and one of fewer is
    measured by its largest entry. The norm of a model is the largest over its tensors.
    """

    norm: Norm
    layout: Layout

    def corner(self, v_D: Tensor, otherwise_D: Tensor | None = None) -> Tensor:
        """The d of the ball with the largest v'd: signs, or the polar factors of matrices. v'd is the dual norm of v.

        Where v is zero (an entry, or a whole matrix) any d will do: that of `otherwise_D`, or ones (on the diagonal).
        """
        sizes = [p.numel() for p in self.layout.params]
        others = [None] * len(sizes) if otherwise_D is None else torch.split(otherwise_D, sizes)
        pieces = zip(torch.split(v_D, sizes), others, self.layout.params, strict=True)
        return torch.cat([self._corner(v, other, p) for v, other, p in pieces])

    def _corner(self, v: Tensor, otherwise: Tensor | None, p: Tensor) -> Tensor:
        if not bool(v.isfinite().all()):
            return torch.full_like(v, float("nan"))
        if self.norm == "max" or p.ndim < 2:
            return torch.where(v == 0, torch.ones_like(v) if otherwise is None else otherwise, v.sign())
        matrix = v.view(p.shape[0], -1)
        if not bool(v.any()):
            return torch.eye(*matrix.shape).to(v).reshape(-1) if otherwise is None else otherwise
        u, _, w = torch.linalg.svd(matrix, full_matrices=False)
        polar: Tensor = u @ w
        return polar.reshape(-1)


@dataclass(frozen=True)
class Ascent:
    """A corner, its d'Hd, and whether no corner is better to first order by more than the tolerance."""

    corner_D: Tensor
    value: float
    converged: bool


def ascend(operator: Operator, ball: UnitBall, start_D: Tensor, *, tol: float, max_products: int) -> Ascent:
    """From a corner d to the corner of (H + tau) d, and so on: the best corner met.

    All corners are equally long, so tau changes nothing but the path. Where H + tau is positive semidefinite no turn
    goes down (Journee et al. 2010, "Generalized power method for sparse PCA", section 2), and the smaller tau is, the
    fewer corners it stops at. It begins at minus the mean curvature of the start, and is raised to minus the curvature
    between two corners wherever that is less.
    """
    corner_D, before = start_D, None
    best = Ascent(start_D, -float("inf"), False)
    shift = 0.0
    for _ in range(max_products):
        product_D = operator.matvec(corner_D)
        value = float(torch.dot(corner_D, product_D))
        if before is None:
            shift = -value / float(torch.dot(corner_D, corner_D))
        else:
            move_D = corner_D - before[0]
            shift = max(shift, -float(torch.dot(move_D, product_D - before[1]) / torch.dot(move_D, move_D)))
        towards_D = product_D + shift * corner_D
        after_D = ball.corner(towards_D, corner_D)
        gap = float(torch.dot(towards_D, after_D - corner_D))
        converged = gap <= tol * abs(value)
        if not value <= best.value:
            best = Ascent(corner_D, value, converged)
        if converged or not value > -float("inf"):
            break
        corner_D, before = after_D, (corner_D, product_D)
    return best


def sharpest_corner(
    operator: Operator, ball: UnitBall, starts: Iterable[Tensor], *, tol: float, max_products: int
) -> tuple[Ascent, float]:
    """The best of the ascents from several starts, and the lowest value that one of them ended at."""
    ends = [ascend(operator, ball, start_D, tol=tol, max_products=max_products) for start_D in starts]
    return max(ends, key=lambda end: end.value), min(end.value for end in ends)
