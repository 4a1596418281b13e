"""The largest eigenvalue of a symmetric operator by Lanczos iteration, stopped on the residual.

After k products the operator is known on a Krylov basis as a k x k tridiagonal matrix T; an eigenpair (theta, s) of T
gives the Ritz pair (theta, y = Q s) with residual norm |A y - theta y| = beta_k |s_k|, known without another product.
theta is never above the largest eigenvalue, and some eigenvalue lies within the residual of it (Parlett 1998, "The
symmetric eigenvalue problem", 4.5 and 13.2). Largest means algebraically largest: a large negative eigenvalue cannot
win.

Shapes: D = size of the operator, k = products so far.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from instruments.operators.operator import Operator

Array = npt.NDArray[np.float64]
AGED = 0.5  # of the tolerance, for every reading since the last audit: with it one reading in a hundred is further off
ROOM = 8  # vectors that are made room for at first; doubled when they do not suffice


@dataclass(frozen=True)
class Ritz:
    """The top Ritz pair and what it is worth.

    `residual` is |A y - value y| for the unit vector y, in the unit of the operator; the error of `value` is at most
    `residual` if the eigenvalue nearest to it is the largest one, and it is always from below. `converged` says whether
    the residual met the tolerance within the allowed products. `vector_D` is y. For a value that is followed, `missed`
    is by how much of it readings like this one were found too low of late, and `since` how many readings ago another
    eigenvalue was last looked for: 0 for one that was just found.
    """

    value: float
    residual: float
    products: int
    converged: bool
    vector_D: Tensor
    missed: float = 0.0
    since: int = 0

    def bound(self, tol: float) -> float:
        """How far above `value` the largest eigenvalue may lie: the residual, what the tolerance cannot resolve, which
        grows while nobody looks for another one, or what was missed before."""
        unresolved = (1 + AGED * self.since) * tol
        return max(self.residual, unresolved * abs(self.value), self.missed * abs(self.value))


def top_eigenvalue(operator: Operator, start_D: Tensor, *, tol: float, max_products: int) -> Ritz:
    """Lanczos with full reorthogonalisation (twice) until residual <= tol * |value|.

    Each product costs one synchronisation with the host. A product that is not finite ends the iteration with value
    NaN, not converged. The zero operator has value 0, converged.
    """
    krylov, converged = krylov_until(operator, start_D, tol=tol, max_products=max_products)
    k = len(krylov.alphas)
    if not krylov.finite:
        return Ritz(float("nan"), float("nan"), k, False, start_D)
    values_k, s_kk = krylov.pairs()
    s_k = torch.as_tensor(s_kk[:, -1].copy(), dtype=operator.dtype, device=operator.device)
    residual = krylov.beta * abs(float(s_kk[-1, -1]))
    return Ritz(float(values_k[-1]), residual, k, converged, s_k @ krylov.basis_kD)


@dataclass(frozen=True)
class Krylov:
    """After k products: T has `alphas` on its diagonal and `betas` beside it, the rows of `basis_kD` are orthonormal.
    `rest_D`, of length `beta`, is what the last product has beside them: A Q' = Q' T + rest e_k'."""

    alphas: list[float]
    betas: list[float]
    beta: float
    basis_kD: Tensor
    rest_D: Tensor

    def pairs(self) -> tuple[Array, Array]:
        """Ritz values, smallest first, and their vectors in the basis, in columns."""
        values_k, s_kk = eigh_tridiagonal(np.array(self.alphas), np.array(self.betas))
        return values_k, s_kk

    @property
    def finite(self) -> bool:
        return math.isfinite(self.alphas[-1]) and math.isfinite(self.beta)

    def exhausted(self, scale: float) -> bool:
        """An invariant subspace: rounding is all that is left of the next vector, for an operator of that size."""
        return self.beta <= 10 * torch.finfo(self.basis_kD.dtype).eps * scale


def krylov_spaces(operator: Operator, start_D: Tensor, limit: int) -> Iterator[Krylov]:
    """The Krylov spaces of 1, 2, ... `limit` products, each orthogonalised twice against all vectors before.

    One product and one synchronisation each. To go on after a space that is exhausted or not finite makes no sense.
    """
    held_mD = torch.empty(min(limit, ROOM), operator.size, dtype=operator.dtype, device=operator.device)
    w_D, beta_k = start_D / start_D.norm(), 1.0
    alphas: list[float] = []
    betas: list[float] = []
    for k in range(limit):
        if k:
            betas.append(beta_k)
        if k == len(held_mD):
            held_mD = torch.cat([held_mD, torch.empty_like(held_mD[: limit - k])])
        held_mD[k] = q_D = w_D / beta_k
        basis_kD = held_mD[: k + 1]
        w_D = operator.matvec(q_D)
        alpha = torch.dot(w_D, q_D)
        for _ in range(2):
            w_D = w_D - basis_kD.T @ (basis_kD @ w_D)
        alpha_k, beta_k = torch.stack([alpha, w_D.norm()]).tolist()
        alphas.append(alpha_k)
        yield Krylov(alphas, betas, beta_k, basis_kD, w_D)


def krylov_until(
    operator: Operator, start_D: Tensor, *, tol: float, max_products: int, more: int = 0
) -> tuple[Krylov, bool]:
    """The first Krylov space whose largest Ritz pair has a residual <= tol * |value|, or that is invariant, and True;
    else the last one, or one that is not finite, and False.

    `more` products follow a small residual, until it is small again: it may have been that of another eigenvector.
    """
    settled = 0
    for krylov in krylov_spaces(operator, start_D, min(max_products, operator.size)):
        if not krylov.finite:
            return krylov, False
        values_k, s_kk = krylov.pairs()
        small = krylov.beta * abs(float(s_kk[-1, -1])) <= tol * abs(float(values_k[-1]))
        if krylov.exhausted(float(np.abs(values_k).max())):
            return krylov, True
        settled += small or settled > 0
        if small and settled > more:
            return krylov, True
    return krylov, small
