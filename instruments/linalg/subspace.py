"""The subspace that products taken so far span, and its Ritz pairs.

With orthonormal rows Q and the products A Q, the matrix T = Q A Q' gives Ritz pairs (theta, y = s Q) and their
residuals A y - theta y, without a further product (Parlett 1998, "The symmetric eigenvalue problem", chapter 11). The
vectors need not come from an iteration: products that others have taken of the same matrix are as good.

Shapes: D = size of the operator, m = dimension of the subspace, k = vectors beside it.
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
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RitzPairs:
    """All of a subspace, largest first: `values_m`, and the rows of `rotation_mm` that make the vectors of its basis.

    `vector_D` is the unit vector of the largest, `residual_D` is A y - theta y of it, `residual` the length of that.
    `inside_km` and `images_km` are V Q' and V A Q' for the vectors V beside. All is NaN where a product was not finite.
    """

    values_m: Array
    rotation_mm: Array
    vector_D: Tensor
    residual_D: Tensor
    residual: float
    inside_km: Array
    images_km: Array

    @property
    def value(self) -> float:
        return float(self.values_m[0])


class Subspace:
    """Grown by one vector at a time. `products` counts those that were taken for it."""

    def __init__(self, operator: Operator, beside_kD: Tensor | None = None) -> None:
        self._operator, self.products = operator, 0
        empty = torch.empty(0, operator.size, dtype=operator.dtype, device=operator.device)
        self.basis_mD = self._images_mD = empty
        self._beside_kD = empty if beside_kD is None else beside_kD
        self._seen_k2m = self._beside_kD.new_empty(len(self._beside_kD), 2, 0)

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
            image_D = (image_D - inside_m @ self._images_mD) / length
        self.basis_mD = torch.cat([self.basis_mD, q_D[None]])
        self._images_mD = torch.cat([self._images_mD, image_D[None]])
        seen_k2 = self._beside_kD @ torch.stack([q_D, image_D], 1)
        self._seen_k2m = torch.cat([self._seen_k2m, seen_k2[..., None]], 2)
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

    def pairs(self) -> RitzPairs:
        """Two synchronisations with the host."""
        basis_mD, images_mD, m = self.basis_mD, self._images_mD, self.dimension
        known = torch.cat([basis_mD @ images_mD.T, self._seen_k2m.flatten(0, 1)]).double().cpu().numpy()
        matrix_mm, inside_km, images_km = known[:m], known[m::2], known[m + 1 :: 2]
        if not np.isfinite(matrix_mm).all():
            broken = np.full((m, m), math.nan)
            return RitzPairs(broken[0], broken, basis_mD[-1], images_mD[-1], math.nan, inside_km, images_km)
        values_m, s_mm = np.linalg.eigh((matrix_mm + matrix_mm.T) / 2)
        values_m, rotation_mm = values_m[::-1].copy(), s_mm[:, ::-1].T.copy()
        s_m = torch.as_tensor(rotation_mm[0], dtype=basis_mD.dtype, device=basis_mD.device)
        y_D = s_m @ basis_mD
        residual_D = s_m @ images_mD - float(values_m[0]) * y_D
        return RitzPairs(values_m, rotation_mm, y_D, residual_D, float(residual_D.norm()), inside_km, images_km)
