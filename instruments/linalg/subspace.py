"""The subspace that products taken so far span, and its largest Ritz pair.

With orthonormal rows Q and the products A Q, the matrix T = Q A Q' gives Ritz pairs (theta, y = s Q) and their
residuals A y - theta y, without a further product (Parlett 1998, "The symmetric eigenvalue problem", chapter 11). The
vectors need not come from an iteration: products that others have taken of the same matrix are as good.

Shapes: D = size of the operator, k = dimension of the subspace.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from instruments.operators.operator import Operator

DEPENDENT = 1e-3  # a vector of which less is new adds nothing but its rounding


@dataclass(frozen=True)
class RitzPair:
    """The largest Ritz value, its unit vector y, A y - value y and its length; `second` is the next Ritz value, -inf
    in one dimension. All are NaN where a product was not finite."""

    value: float
    vector_D: Tensor
    residual_D: Tensor
    residual: float
    second: float


class Subspace:
    """Grown by one vector at a time. `products` counts those that were taken for it."""

    def __init__(self, operator: Operator) -> None:
        self._operator, self.products = operator, 0
        empty = torch.empty(0, operator.size, dtype=operator.dtype, device=operator.device)
        self._basis_kD = self._image_kD = empty

    @property
    def dimension(self) -> int:
        return len(self._basis_kD)

    def add(self, v_D: Tensor, image_D: Tensor | None = None) -> bool:
        """False where v lies in the subspace already. One product of what is new of v, unless A v is given."""
        inside_k, rest_D = v_D.new_zeros(self.dimension), v_D
        for _ in range(2):
            part_k = self._basis_kD @ rest_D
            rest_D, inside_k = rest_D - part_k @ self._basis_kD, inside_k + part_k
        length = rest_D.norm()
        if not bool(length > DEPENDENT * v_D.norm()):
            return False
        q_D = rest_D / length
        if image_D is None:
            self.products += 1
            image_D = self._operator.matvec(q_D)
        else:
            image_D = (image_D - inside_k @ self._image_kD) / length
        self._basis_kD = torch.cat([self._basis_kD, q_D[None]])
        self._image_kD = torch.cat([self._image_kD, image_D[None]])
        return True

    def top(self) -> RitzPair:
        """One synchronisation with the host."""
        matrix_kk = (self._basis_kD @ self._image_kD.T).double().cpu().numpy()
        if not np.isfinite(matrix_kk).all():
            return RitzPair(math.nan, self._basis_kD[-1], self._image_kD[-1], math.nan, math.nan)
        values_k, s_kk = np.linalg.eigh((matrix_kk + matrix_kk.T) / 2)
        s_k = torch.as_tensor(s_kk[:, -1].copy(), dtype=self._basis_kD.dtype, device=self._basis_kD.device)
        value, y_D = float(values_k[-1]), s_k @ self._basis_kD
        residual_D = s_k @ self._image_kD - value * y_D
        second = float(values_k[-2]) if len(values_k) > 1 else -math.inf
        return RitzPair(value, y_D, residual_D, float(residual_D.norm()), second)
