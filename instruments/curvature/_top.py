"""Several of the largest eigenvalues of an operator by one Lanczos iteration.

Shapes: D = size of the operator, k = eigenpairs asked for, m = products so far.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from instruments.linalg.lanczos import krylov_spaces
from instruments.operators.operator import Operator, random_unit

Array = npt.NDArray[np.float64]
HINT, RANDOM = 0.2, 0.3
"""Weights in a start, against 1 for what was kept. With 0.1 of chance a third of the readings along the training of a
small classifier missed one of six eigenvalues, with 0.3 one in thirty, for 0.7 products more."""


@dataclass(frozen=True)
class Top:
    """Ritz pairs, largest first, and what they are worth.

    `values` are never above the eigenvalues of the same rank; each has some eigenvalue within its entry of
    `residuals` (|A y - value y|). Both have shape (k,), with NaN where the Krylov space has ended before: eigenvalues
    that occur several times are found once. `vectors_kD` has as many rows as there are values.
    """

    values: Array
    residuals: Array
    vectors_kD: Tensor
    products: int
    converged: bool

    def kept(self) -> Tensor | None:
        """One vector to start the next reading from: the sum of the Ritz vectors."""
        return self.vectors_kD.sum(0) if len(self.vectors_kD) else None


def top_eigenpairs(operator: Operator, start_D: Tensor, *, k: int, tol: float, max_products: int) -> Top:
    """Lanczos, orthogonalised twice against all vectors before, until all k residuals are <= tol * |largest|.

    Largest means algebraically largest. Each product costs one synchronisation; memory is `max_products` vectors. A
    product that is not finite ends the iteration with NaN, not converged.
    """
    for krylov in krylov_spaces(operator, start_D, min(max_products, operator.size)):
        m = len(krylov.alphas)
        if not krylov.finite:
            nothing = np.full(k, np.nan)
            return Top(nothing, nothing, krylov.basis_kD[:0], m, False)
        values_m, vectors_mm = krylov.pairs()
        found = min(k, m)
        values, vectors = values_m[::-1][:found], vectors_mm[:, ::-1][:, :found]
        residuals = krylov.beta * np.abs(vectors[-1])
        met = found == k and bool((residuals <= tol * abs(values[0])).all())
        converged = met or krylov.exhausted(float(np.abs(values_m).max()))
        if converged:
            break
    rows_kD = torch.as_tensor(vectors.T.copy(), dtype=operator.dtype, device=operator.device) @ krylov.basis_kD
    return Top(_padded(values, k), _padded(residuals, k), rows_kD, m, converged)


def start_from(operator: Operator, kept_D: Tensor | None, hint_D: Tensor, seed: int) -> Tensor:
    """What an earlier reading kept, a direction rich in curvature (the gradient), and chance, for what both lack."""
    start_D = RANDOM * random_unit(operator, seed)
    for weight, v_D in ((HINT, hint_D), (1.0, kept_D)):
        if v_D is not None and len(v_D) == operator.size:
            v_D = v_D.to(operator.device, operator.dtype)
            norm = v_D.norm()
            usable = (norm > 0) & norm.isfinite()
            start_D = start_D + torch.where(usable, weight * v_D / norm, torch.zeros_like(v_D))
    return start_D


def _padded(values: Array, k: int) -> Array:
    return np.concatenate([values, np.full(k - len(values), np.nan)])
