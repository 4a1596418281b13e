"""The subspace that products taken so far span, and its Ritz pairs.

With orthonormal rows Q and the products A Q, the matrix T = Q A Q' gives Ritz pairs (theta, y = s Q) and their
residuals A y - theta y, without a further product (Parlett 1998, "The symmetric eigenvalue problem", chapter 11). The
vectors need not come from an iteration: products that others have taken of the same matrix are as good.

Shapes: D = size of the operator, m = dimension of the subspace, e = vectors beside it.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from instruments.linalg.lanczos import Krylov
from instruments.operators.operator import Operator

DEPENDENT = 1e-3  # a vector of which less is new adds nothing but its rounding


@dataclass(frozen=True)
class RitzPairs:
    """All of a subspace, largest first: values and the rotation that makes the vectors of its basis.

    `vector_D` is the unit vector of the largest, `residual_D` is A y - theta y of it, `residual` the length of that.
    All are NaN where a product was not finite.
    """

    values_m: npt.NDArray[np.float64]
    rotation_mm: Tensor
    vector_D: Tensor
    residual_D: Tensor
    residual: float

    @property
    def value(self) -> float:
        return float(self.values_m[0])


class Subspace:
    """Grown by one vector at a time. `products` counts those that were taken for it."""

    def __init__(self, operator: Operator) -> None:
        self._operator, self.products = operator, 0
        empty = torch.empty(0, operator.size, dtype=operator.dtype, device=operator.device)
        self.basis_mD = self.images_mD = empty

    @property
    def dimension(self) -> int:
        return len(self.basis_mD)

    def add(self, v_D: Tensor, image_D: Tensor | None = None, *, least: float = DEPENDENT) -> bool:
        """False where the subspace has v already, but for a part of its length below `least`. One product of what is
        new of v, unless A v is given."""
        inside_m, rest_D = v_D.new_zeros(self.dimension), v_D
        for _ in range(2):
            part_m = self.basis_mD @ rest_D
            rest_D, inside_m = rest_D - part_m @ self.basis_mD, inside_m + part_m
        length = rest_D.norm()
        if not bool(length > least * v_D.norm()):
            return False
        q_D = rest_D / length
        if image_D is None:
            self.products += 1
            image_D = self._operator.matvec(q_D)
        else:
            image_D = (image_D - inside_m @ self.images_mD) / length
        self.basis_mD = torch.cat([self.basis_mD, q_D[None]])
        self.images_mD = torch.cat([self.images_mD, image_D[None]])
        return True

    def take(self, krylov: Krylov, most: int) -> None:
        """The largest Ritz pairs of a Krylov space of the same operator, with the products that it has cost."""
        self.products += len(krylov.alphas)
        if not krylov.finite:
            self.add(krylov.basis_kD[0], krylov.rest_D)
            return
        values_k, s_kk = krylov.pairs()
        pick_mk = torch.as_tensor(s_kk[:, ::-1][:, :most].T.copy()).to(krylov.basis_kD)
        for value, pick_k in zip(values_k[::-1][:most].tolist(), pick_mk, strict=True):
            v_D = pick_k @ krylov.basis_kD
            self.add(v_D, value * v_D + pick_k[-1] * krylov.rest_D)

    def new_parts(self, v_eD: Tensor, least: float) -> Tensor:
        """Orthonormal rows: of each vector what is neither in the subspace nor in the ones before, if it is longer than
        `least`."""
        known_mD = self.basis_mD
        for v_D in v_eD:
            for _ in range(2):
                v_D = v_D - (known_mD @ v_D) @ known_mD
            length = v_D.norm()
            if bool(length > least):
                known_mD = torch.cat([known_mD, v_D[None] / length])
        return known_mD[self.dimension :]

    def pairs(self) -> RitzPairs:
        """One synchronisation with the host."""
        basis_mD, images_mD = self.basis_mD, self.images_mD
        matrix_mm = (basis_mD @ images_mD.T).double().cpu().numpy()
        if not np.isfinite(matrix_mm).all():
            broken, nothing = np.full(self.dimension, math.nan), basis_mD.new_full((self.dimension,) * 2, math.nan)
            return RitzPairs(broken, nothing, basis_mD[-1], images_mD[-1], math.nan)
        values_m, s_mm = np.linalg.eigh((matrix_mm + matrix_mm.T) / 2)
        rotation_mm = torch.as_tensor(s_mm[:, ::-1].T.copy(), dtype=basis_mD.dtype, device=basis_mD.device)
        vector_D = rotation_mm[0] @ basis_mD
        residual_D = rotation_mm[0] @ images_mD - float(values_m[-1]) * vector_D
        return RitzPairs(values_m[::-1].copy(), rotation_mm, vector_D, residual_D, float(residual_D.norm()))
