"""The subspace that products taken by others span: its largest Ritz pair, at no further product.

With orthonormal rows Q and the products A Q, the matrix T = Q A Q' gives Ritz pairs (theta, y = s Q) and their
residuals A y - theta y (Parlett 1998, "The symmetric eigenvalue problem", chapter 11).

Shapes: D = size of the operator, k = dimension of the subspace.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

DEPENDENT = 1e-3  # a vector of which less is new adds nothing but its rounding


@dataclass(frozen=True)
class RitzPair:
    """The largest Ritz value, its unit vector y, and |A y - value y|."""

    value: float
    vector_D: Tensor
    residual: float


def top_ritz_pair(pairs: Sequence[tuple[Tensor, Tensor]]) -> RitzPair | None:
    """Of the span of v for the given (v, A v); None where there are fewer than two, or one is not finite."""
    basis_kD, image_kD = _orthonormal(pairs)
    if len(basis_kD) < 2:
        return None
    matrix_kk = (basis_kD @ image_kD.T).double().cpu().numpy()
    if not np.isfinite(matrix_kk).all():
        return None
    values_k, s_kk = np.linalg.eigh((matrix_kk + matrix_kk.T) / 2)
    s_k = torch.as_tensor(s_kk[:, -1].copy(), dtype=basis_kD.dtype, device=basis_kD.device)
    y_D, value = s_k @ basis_kD, float(values_k[-1])
    residual = float((s_k @ image_kD - value * y_D).norm())
    return RitzPair(value, y_D, residual) if math.isfinite(residual) else None


def _orthonormal(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Rows Q with the span of the v, and A Q by the same combinations of the A v."""
    size = pairs[0][0].shape[0] if pairs else 0
    basis_kD = image_kD = pairs[0][0].new_empty(0, size) if pairs else torch.empty(0, 0)
    for v_D, product_D in pairs:
        inside_k, rest_D = v_D.new_zeros(len(basis_kD)), v_D
        for _ in range(2):
            part_k = basis_kD @ rest_D
            rest_D, inside_k = rest_D - part_k @ basis_kD, inside_k + part_k
        length = rest_D.norm()
        if bool(length > DEPENDENT * v_D.norm()):
            basis_kD = torch.cat([basis_kD, (rest_D / length)[None]])
            image_kD = torch.cat([image_kD, ((product_D - inside_k @ image_kD) / length)[None]])
    return basis_kD, image_kD
