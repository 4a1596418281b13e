"""The top eigenvalue of an operator that changes a little from reading to reading.

A reading starts from the last Ritz vector and corrects it until the error of the Ritz value is small: two products in
the median instead of six to eight. What that can miss is an eigenvalue that has overtaken the tracked one: the residual
is small, the answer is an eigenvalue, and it is not the largest. Three measures against it:

- the three next Ritz pairs are kept, too (`kept_pairs`); one that may be the largest by now costs one more product and
  is in the answer. At the edge of stability, where eigenvalues crowd, that is what finds most of those that overtake;
- the start contains the gradient, which is rich in directions of high curvature, and a little of a random vector;
- audits: a second iteration from a fresh start, whose products count together with the others. They come after 1, 2,
  4, ... and at most `AUDIT_EVERY` readings, at once where the vector has turned away from all that was kept, and at the
  next reading again after one that found more than `FOUND` missing, which also widens the bound of the readings that
  follow. Calm runs are audited rarely, restless ones nearly always.

Products that another instrument has taken of the same matrix at this step are used first: under SGD, where rho is the
sharpness times a number, it then costs none.

Shapes: D = size of the operator, k = kept pairs.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from instruments.linalg.kept_pairs import KEPT, KeptPairs, keep
from instruments.linalg.lanczos import Ritz, krylov_until
from instruments.linalg.subspace import RitzPairs, Subspace
from instruments.operators.operator import Operator, random_unit

HINT, RANDOM = 0.1, 0.02  # weights in a warm start, against 1 for the last Ritz vector
RIVAL = 0.15  # weight of the next kept vector in the first correction, against 1
KNOWN = 0.1  # of its length: a start of which less is new is left out
FRESH_RANDOM = 0.5  # weight of the random vector in a fresh start, against 1 for the hint
FRESH_TOL = 0.03
COLD = 4  # products after that at a first reading, which nothing else audits
AUDIT_EVERY = 8
TURNED, FOUND = 0.7, 0.02  # a cosine with what was kept, and a part of the value
GAP = 0.45  # of the value: at which `tol` bounds the residual itself


@dataclass(frozen=True)
class Track:
    """What is kept between readings.

    `readings` counts them; `values` and `vectors_kD` are the kept pairs, the last answer first; `missed` is by how much
    audits have found the followed value too low, in parts of it, an older finding counting half at every audit. The
    next audit is due when `since` the last one there were `period` readings.
    """

    readings: int = 0
    values: tuple[float, ...] = ()
    vectors_kD: Tensor | None = None
    missed: float = 0.0
    period: int = 1
    since: int = 0

    def state(self) -> dict[str, Any]:
        return vars(self).copy()

    def kept(self, operator: Operator) -> KeptPairs | None:
        """None before the first reading, and where the operator has another size by now."""
        if self.vectors_kD is None or self.vectors_kD.shape[1] != operator.size:
            return None
        return KeptPairs(self.values, self.vectors_kD.to(operator.device, operator.dtype))


def follow(
    operator: Operator, track: Track, hint_D: Tensor, *, tol: float, max_products: int, seed: int
) -> tuple[Ritz, Track]:
    """One reading and the memory for the next. `hint_D` is a direction likely to be sharp (the gradient).

    Costs are in `Ritz.products`, audits included. A vector of another size (the model grew, another parameter was
    frozen) starts cold.
    """
    reading = _Reading(operator, hint_D, tol, max_products, seed)
    kept = track.kept(operator)
    space = Subspace(operator, None if kept is None else kept.vectors_kD)
    if kept is None:
        reading.look_afresh(space, more=COLD)
        return reading.answer(space, space.pairs(), None, Track(readings=track.readings))
    for pair in operator.known():
        space.add(*pair)
    top = reading.followed(space, kept)
    if math.isnan(top.value):
        return reading.answer(space, top, kept, track)
    missed, period, since = track.missed, track.period, track.since + 1
    if since >= period or _turned(top):
        before = top.value
        reading.look_afresh(space)
        top = reading.improved(space, kept)
        scale = max(abs(top.value), abs(before))
        found = (top.value - before) / scale if scale else 0.0
        missed = max(found, missed / 2)
        period, since = 1 if found > FOUND else min(2 * period, AUDIT_EVERY), 0
    return reading.answer(space, top, kept, replace(track, missed=missed, period=period, since=since))


class _Reading:
    """What all parts of one reading have in common."""

    def __init__(self, operator: Operator, hint_D: Tensor, tol: float, max_products: int, seed: int) -> None:
        self._operator, self._tol, self._most = operator, tol, max_products
        self._hint_D, self._noise_D = _unit(hint_D), random_unit(operator, seed)

    def look_afresh(self, space: Subspace, more: int = 0) -> None:
        """Lanczos from the hint and chance, by itself; what it finds joins the subspace."""
        start_D, tol = self._hint_D + FRESH_RANDOM * self._noise_D, min(self._tol, FRESH_TOL)
        krylov, _ = krylov_until(self._operator, start_D, tol=tol, max_products=self._most, more=more)
        space.take(krylov, KEPT)

    def followed(self, space: Subspace, kept: KeptPairs) -> RitzPairs:
        """From what others know of the operator and the tracked vector to the largest of all that was kept."""
        last_D = kept.vectors_kD[0]
        sign = torch.where(torch.dot(self._hint_D, last_D) < 0, -1.0, 1.0)
        space.add(last_D + HINT * sign * self._hint_D + RANDOM * self._noise_D, least=KNOWN)
        top = self.improved(space, kept, RIVAL)
        while not math.isnan(top.value) and space.products < self._most:
            rival_D = kept.rival(top)
            if rival_D is None or not space.add(rival_D):
                break
            top = self.improved(space, kept)
        return top

    def improved(self, space: Subspace, kept: KeptPairs, rival: float = 0.0) -> RitzPairs:
        """The Ritz pairs, by further products until the largest is good enough.

        `rival` puts that much of the next kept vector into the first of them: its image says what has become of that
        one.
        """
        top = space.pairs()
        while not self._done(top, kept) and space.products < self._most:
            if not space.add(kept.correction(top, rival)):
                break
            top, rival = space.pairs(), 0.0
        return top

    def _done(self, top: RitzPairs, kept: KeptPairs) -> bool:
        return math.isnan(top.value) or (self._settled(top, kept) and len(top.values_m) > 1)

    def _settled(self, top: RitzPairs, kept: KeptPairs | None) -> bool:
        """Whether the value is as good as a residual of `tol` leaves it at a gap of `GAP`: residual^2 / gap."""
        if kept is None:
            return top.residual <= self._tol * abs(top.value)
        return kept.error(top) <= self._tol**2 / GAP * abs(top.value)

    def answer(self, space: Subspace, top: RitzPairs, kept: KeptPairs | None, track: Track) -> tuple[Ritz, Track]:
        """Of a broken model nothing is kept."""
        y_D = top.vector_D
        if math.isnan(top.value):
            return Ritz(top.value, top.residual, space.products, False, y_D), Track(readings=track.readings + 1)
        converged = self._settled(top, kept)
        ritz = Ritz(top.value, top.residual, space.products, converged, y_D, track.missed, track.since)
        pairs = keep(space, top, kept)
        return ritz, replace(
            track, readings=track.readings + 1, values=tuple(pairs.values), vectors_kD=pairs.vectors_kD
        )


def _turned(top: RitzPairs) -> bool:
    """Whether the vector lies beside those that were kept."""
    return float(np.linalg.norm(top.inside_km @ top.rotation_mm[0])) < TURNED


def _unit(v_D: Tensor) -> Tensor:
    """v / |v|; zero for a vector that has no direction."""
    norm = v_D.norm()
    return torch.where((norm > 0) & norm.isfinite(), v_D / norm, torch.zeros_like(v_D))
