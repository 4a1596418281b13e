"""Ritz pairs kept from the last reading of an operator that has changed a little since.

They say where the next eigenvalues are: how large the error is that a residual stands for, along which of them it is to
be corrected, and which of them may have become the largest.

Shapes: D = size of the operator, k = kept pairs, m = dimension of the subspace of this reading, which was made with the
kept vectors beside it; e = directions that the kept vectors have and the subspace has not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from instruments.linalg.subspace import Array, RitzPairs, Subspace

KEPT = 4
LEAST_GAP = 0.1  # of the value: the smallest gap that is reckoned with
MEASURED, CLOSE, STALE = 0.2, 0.05, 0.08
"""A kept vector is a rival if it is at most `CLOSE` of the value below it, by that part of it that the subspace has; if
that is shorter than `MEASURED`, at most `STALE`, by its last Ritz value."""
INSIDE = 0.9  # of its length: a kept vector that the subspace has
NEW = 0.3  # of the length of a kept vector: what the subspace has not of it, and which stays


@dataclass(frozen=True)
class KeptPairs:
    """Orthonormal rows of `vectors_kD`, the tracked one first, the others by their Ritz values."""

    values: Sequence[float]
    vectors_kD: Tensor

    def error(self, top: RitzPairs) -> float:
        """By how much the value is too low, to second order: sum_k (v_k'r)^2 / gap_k, and what of the residual r lies
        outside over the last of the gaps (Parlett 1998, "The symmetric eigenvalue problem", 11.7)."""
        squares_k, gaps_k = self._parts(top) ** 2, self._gaps(top.value)
        outside = max(top.residual**2 - float(squares_k.sum()), 0.0)
        return float((squares_k / gaps_k).sum() + outside / gaps_k[-1])

    def correction(self, top: RitzPairs, rival: float = 0.0) -> Tensor:
        """The residual, each of its parts over its gap: what is missing of the vector, to first order (Davidson 1975,
        with the kept pairs for the operator); and, where there is one, `rival` of the next kept vector, less the lower
        it was."""
        gaps_k = self._gaps(top.value)
        parts_k = (1 / gaps_k - 1 / gaps_k[-1]) * self._parts(top)
        if rival and len(self.values) > 1:
            share = rival * min(1.0, max(0.0, self.values[1] / max(abs(top.value), 1e-300))) ** 2
            parts_k[1] += -share if parts_k[1] < 0 else share
        return top.residual_D / float(gaps_k[-1]) + _like(parts_k, top.residual_D) @ self.vectors_kD

    def rival(self, top: RitzPairs) -> Tensor | None:
        """The kept vector that is most likely to be above the value, if the subspace does not have it."""
        squares_k = (top.inside_km**2).sum(1)
        seen_k = (top.inside_km * top.images_km).sum(1) / np.maximum(squares_k, 1e-30)
        size = abs(top.value)
        lead_k = [
            -math.inf if length > INSIDE else seen + CLOSE * size if length > MEASURED else last + STALE * size
            for length, seen, last in zip(np.sqrt(squares_k), seen_k, self.values, strict=True)
        ]
        best = int(np.argmax(lead_k))
        return self.vectors_kD[best] if lead_k[best] > top.value else None

    def _parts(self, top: RitzPairs) -> Array:
        """v_k'r."""
        parts_k: Array = (top.images_km - top.value * top.inside_km) @ top.rotation_mm[0]
        return parts_k

    def _gaps(self, value: float) -> Array:
        """From the value down to each kept one; the last is that to all that is not kept."""
        gaps_k = np.maximum(value - np.array(self.values), LEAST_GAP * abs(value))
        return np.maximum(gaps_k, 1e-300)


def keep(space: Subspace, top: RitzPairs, last: KeptPairs | None) -> KeptPairs:
    """The pairs for the next reading: the top one, and those of the complement, by what the products of this reading
    and the pairs of the last say of it. Of the vectors that were kept, what the subspace has not still counts with its
    old values."""
    s_mm, t_mm = top.rotation_mm[1:], top.rotation_mm.T @ (top.values_m[:, None] * top.rotation_mm)
    matrix, inside_m = np.diag(top.values_m[1:]), s_mm
    outside_k = np.zeros((len(s_mm), 0))
    if last is not None:
        lengths_sq, u_kk = np.linalg.eigh(np.eye(len(last.values)) - top.inside_km @ top.inside_km.T)
        new = lengths_sq > NEW**2
        n_ek = (u_kk[:, new] / np.sqrt(lengths_sq[new])).T  # n (V - V Q' Q) are orthonormal
        across = n_ek @ (top.images_km - top.inside_km @ t_mm) @ s_mm.T
        along_ek = np.sqrt(lengths_sq[new])[:, None] * u_kk[:, new].T
        corner_ee = (along_ek * np.array(last.values)) @ along_ek.T
        matrix = np.block([[matrix, across.T], [across, corner_ee]])
        inside_m = np.concatenate([s_mm, -n_ek @ top.inside_km])
        outside_k = np.concatenate([np.zeros((len(s_mm), len(last.values))), n_ek])
    values, turns = np.linalg.eigh(matrix)
    chosen = turns[:, ::-1][:, : KEPT - 1].T
    others_kD = _like(chosen @ inside_m, space.basis_mD) @ space.basis_mD
    if last is not None:
        others_kD += _like(chosen @ outside_k, others_kD) @ last.vectors_kD
    return KeptPairs((top.value, *values[::-1][: KEPT - 1].tolist()), torch.cat([top.vector_D[None], others_kD]))


def _like(numbers: Array, tensor: Tensor) -> Tensor:
    return torch.as_tensor(numbers, dtype=tensor.dtype, device=tensor.device)
