"""Ritz pairs kept from the last reading of an operator that has changed a little since.

They say where the next eigenvalues are: how large the error is that a residual stands for, along which of them it is to
be corrected, and which of them may have become the largest.

Shapes: D = size of the operator, k = kept pairs, m = dimension of the subspace of this reading.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from instruments.linalg.subspace import RitzPairs, Subspace

KEPT = 4
LEAST_GAP = 0.1  # of the value: the smallest gap that is reckoned with
MEASURED, CLOSE, STALE = 0.2, 0.07, 0.12
"""A kept vector is a rival if it is at most `CLOSE` of the value below it, by that part of it that the subspace has; if
that is shorter than `MEASURED`, at most `STALE`, by its last Ritz value."""
INSIDE = 0.9  # of its length: a kept vector that the subspace has
NEW = 0.3  # of its length: what the subspace has not of a kept vector that stays


@dataclass(frozen=True)
class KeptPairs:
    """Orthonormal rows of `vectors_kD`, the tracked one first, the others by their Ritz values."""

    values: Sequence[float]
    vectors_kD: Tensor

    def error(self, top: RitzPairs) -> float:
        """By how much the value is too low, to second order: sum_k (v_k'r)^2 / gap_k, and what of the residual r lies
        outside over the last of the gaps (Parlett 1998, "The symmetric eigenvalue problem", 11.7)."""
        parts_k = self.vectors_kD @ top.residual_D
        squares_k = parts_k.double().square().cpu().numpy()
        gaps_k = self._gaps(top.value)
        outside = max(top.residual**2 - float(squares_k.sum()), 0.0)
        return float((squares_k / gaps_k).sum() + outside / gaps_k[-1])

    def correction(self, top: RitzPairs, rival: float = 0.0) -> Tensor:
        """The residual, each of its parts over its gap: what is missing of the vector, to first order (Davidson 1975,
        with the kept pairs for the operator); and, where there is one, `rival` of the next kept vector, less the lower
        it was."""
        parts_k = self.vectors_kD @ top.residual_D
        gaps_k = self._gaps(top.value)
        weights_k = torch.as_tensor(1 / gaps_k - 1 / gaps_k[-1], dtype=parts_k.dtype, device=parts_k.device)
        parts_k = weights_k * parts_k
        if rival and len(self.values) > 1:
            share = rival * min(1.0, max(0.0, self.values[1] / max(abs(top.value), 1e-300))) ** 2
            parts_k[1] += torch.where(parts_k[1] < 0, -share, share)
        return top.residual_D / float(gaps_k[-1]) + parts_k @ self.vectors_kD

    def _gaps(self, value: float) -> npt.NDArray[np.float64]:
        """From the value down to each kept one; the last is that to all that is not kept."""
        gaps_k = np.maximum(value - np.array(self.values), LEAST_GAP * abs(value))
        return np.maximum(gaps_k, 1e-300)

    def rival(self, space: Subspace, value: float) -> Tensor | None:
        """The kept vector that is most likely to be above the value, if the subspace does not have it."""
        inside_km, images_km = (self.vectors_kD @ t.T for t in (space.basis_mD, space.images_mD))
        squares_k = inside_km.square().sum(1)
        seen_k2 = torch.stack([squares_k.sqrt(), (inside_km * images_km).sum(1) / squares_k.clamp_min(1e-30)], 1)
        lead_k = [
            -math.inf if length > INSIDE
            else seen - (value - CLOSE * abs(value)) if length > MEASURED
            else last - (value - STALE * abs(value))
            for (length, seen), last in zip(seen_k2.tolist(), self.values, strict=True)
        ]  # fmt: skip
        best = int(np.argmax(lead_k))
        return self.vectors_kD[best] if lead_k[best] > 0 else None


def keep(space: Subspace, top: RitzPairs, last: KeptPairs | None) -> KeptPairs:
    """The pairs for the next reading: the top one, and what the products of this reading and the pairs of the last say
    of the complement. Of the vectors that were kept, what the subspace has not still counts with its old values."""
    rotation = top.rotation_mm[1:]
    rows_mD, matrix = rotation @ space.basis_mD, np.diag(top.values_m[1:])
    if last is not None:
        rest_eD = space.new_parts(last.vectors_kD, NEW)
        across_em = (rest_eD @ (rotation @ space.images_mD).T).double().cpu().numpy()
        kept_ek = (rest_eD @ last.vectors_kD.T).double().cpu().numpy()
        corner_ee = (kept_ek * np.array(last.values)) @ kept_ek.T
        matrix = np.block([[matrix, across_em.T], [across_em, corner_ee]])
        rows_mD = torch.cat([rows_mD, rest_eD])
    values, turns = np.linalg.eigh(matrix)
    chosen = turns[:, ::-1][:, : KEPT - 1].T.copy()
    others_kD = torch.as_tensor(chosen, dtype=rows_mD.dtype, device=rows_mD.device) @ rows_mD
    return KeptPairs((top.value, *values[::-1][: KEPT - 1].tolist()), torch.cat([top.vector_D[None], others_kD]))
