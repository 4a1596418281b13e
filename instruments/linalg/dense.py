"""The whole matrix of an operator and its whole spectrum: the oracle for small problems.

Shapes: D = size of the operator.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from instruments.operators.operator import Operator
from instruments.refusal import Refusal

LIMIT = 3000
"""Largest size: 3,000 products, 72 MB in float64 and some ten seconds for the eigenvalues."""


@dataclass(frozen=True)
class Dense:
    """`matrix_DD` is (A + A')/2 in float64 on the host, `asymmetry` is |A - A'| / |A| of what the products gave:
    rounding for an exact operator, its own error for an approximate one. Norms are Frobenius norms."""

    matrix_DD: Tensor
    asymmetry: float
    products: int

    def eigenvalues(self) -> Tensor:
        """All eigenvalues in ascending order, shape (D,)."""
        values_D: Tensor = torch.linalg.eigvalsh(self.matrix_DD)
        return values_D

    def eigenpairs(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues in ascending order, shape (D,), and orthonormal eigenvectors as columns, shape (D, D)."""
        values_D, vectors_DD = torch.linalg.eigh(self.matrix_DD)
        return values_D, vectors_DD


def dense(operator: Operator, *, limit: int = LIMIT) -> Dense:
    """Every column by one product with a unit vector. Raises Refusal above `limit` or where a product is not finite."""
    if operator.size > limit:
        raise Refusal(
            f"expected at most {limit:,} parameters for a dense matrix, got {operator.size:,}; read a block of the "
            "operator, or estimate its spectrum from products."
        )
    columns = []
    for i in range(operator.size):
        unit_D = torch.zeros(operator.size, dtype=operator.dtype, device=operator.device)
        unit_D[i] = 1.0
        columns.append(operator.matvec(unit_D).cpu().double())
    a_DD = torch.stack(columns, 1)
    if not bool(a_DD.isfinite().all()):
        raise Refusal("a product of the operator is not finite, so its matrix has no eigenvalues.")
    norm = float(a_DD.norm())
    asymmetry = float((a_DD - a_DD.T).norm()) / norm if norm > 0 else 0.0
    return Dense((a_DD + a_DD.T) / 2, asymmetry, operator.size)
