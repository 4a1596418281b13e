"""The top eigenvalue of an operator that changes a little from reading to reading.

A reading starts from the last Ritz vector and goes on with its residuals until the error of the Ritz value, about
residual^2 / gap with the gap to the next eigenvalue, is small (`_settled`): two products in the median instead of six
to eight. What that can miss is an eigenvalue that has overtaken the tracked one along a direction the start does not
contain: the residual is small, the answer is an eigenvalue, and it is not the largest. Three measures against it:

- the start contains the gradient, which is rich in directions of high curvature, and a little of a random vector;
- a value that fell by more than `DROP` since the last reading is doubted: the iteration goes on for more products or a
  smaller residual before it is believed;
- audits: a second iteration from a fresh start, and the larger of the two answers counts (both are lower bounds, so
  the larger is the better). They come after 1, 2, 4, ... and at most `AUDIT_EVERY` readings, at once where the vector
  has turned away from the last one, and at the next reading again after one that found more than `FOUND` missing, which
  also widens the bound of the readings that follow. Calm runs are audited rarely, restless ones nearly always.

Products that another instrument has taken of the same matrix at this step are used first: under SGD, where rho is the
sharpness times a number, it then costs none.

Shapes: D = size of the operator.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from instruments.linalg.lanczos import Ritz, top_eigenvalue
from instruments.linalg.subspace import RitzPair, Subspace
from instruments.operators.operator import Operator, random_unit

HINT, RANDOM = 0.2, 0.02  # weights in a warm start, against 1 for the last Ritz vector
FRESH_RANDOM = 0.5  # weight of the random vector in a fresh start, against 1 for the hint
FRESH_TOL = 0.03
AUDIT_EVERY, DROP = 8, 0.14
DOUBTED_PRODUCTS, DOUBTED_TOL = 5, 0.03
TURNED, FOUND = 0.7, 0.02  # a cosine with the last vector, and a part of the value
GAP, LEAST_GAP = 0.2, 0.05  # of the value: at which `tol` bounds the residual itself, and the smallest reckoned with


@dataclass(frozen=True)
class Track:
    """What is kept between readings.

    `readings` counts them; `value` and `vector_D` are the last answer; `missed` is by how much audits have found the
    followed value too low, in parts of it, an older finding counting half at every audit. The next audit is due when
    `since` the last one there were `period` readings.
    """

    readings: int = 0
    value: float = 0.0
    vector_D: Tensor | None = None
    missed: float = 0.0
    period: int = 1
    since: int = 0

    def state(self) -> dict[str, Any]:
        return vars(self).copy()


def follow(
    operator: Operator, track: Track, hint_D: Tensor, *, tol: float, max_products: int, seed: int
) -> tuple[Ritz, Track]:
    """One reading and the memory for the next. `hint_D` is a direction likely to be sharp (the gradient).

    Costs are in `Ritz.products`, audits included. A vector of another size (the model grew, another parameter was
    frozen) starts cold.
    """
    noise_D, hint_D = random_unit(operator, seed), _unit(hint_D)
    last_D = track.vector_D

    def afresh() -> Ritz:
        start_D = hint_D + FRESH_RANDOM * noise_D
        return top_eigenvalue(operator, start_D, tol=min(tol, FRESH_TOL), max_products=max_products)

    if last_D is None or last_D.shape[0] != operator.size:
        ritz = afresh()
        return ritz, _after(ritz, Track())
    last_D = last_D.to(operator.device, operator.dtype)
    sign = torch.where(torch.dot(hint_D, last_D) < 0, -1.0, 1.0)
    start_D = last_D + HINT * sign * hint_D + RANDOM * noise_D
    ritz = _followed(operator, track, last_D, start_D, tol=tol, max_products=max_products)
    if math.isnan(ritz.value):
        return ritz, _after(ritz, track)
    missed, period, since = track.missed, track.period, track.since + 1
    if since >= period or _turned(last_D, ritz.vector_D):
        audit = afresh()
        better = audit if audit.value > ritz.value else ritz
        scale = max(abs(better.value), abs(ritz.value))
        found = (better.value - ritz.value) / scale if scale else 0.0
        missed = max(found, missed / 2)
        period, since = 1 if found > FOUND else min(2 * period, AUDIT_EVERY), 0
        ritz = replace(better, products=ritz.products + audit.products)
    ritz = replace(ritz, missed=missed, since=since)
    return ritz, _after(ritz, replace(track, missed=missed, period=period, since=since))


def _followed(
    operator: Operator, track: Track, last_D: Tensor, start_D: Tensor, *, tol: float, max_products: int
) -> Ritz:
    """From what others know of the operator and the start; each further product is of the residual.

    What others know is enough without the start where it is the tracked vector: their vectors may span eigenvectors
    that are not the top one.
    """
    space, floor = Subspace(operator), track.value - DROP * abs(track.value)
    for pair in operator.known():
        space.add(*pair)

    def done(top: RitzPair) -> bool:
        if space.dimension < 2 or not _settled(top, tol):
            return math.isnan(top.value)
        if not space.products:
            return top.value >= floor and not _turned(last_D, top.vector_D)
        believed = space.products >= DOUBTED_PRODUCTS or top.residual <= DOUBTED_TOL * abs(top.value)
        return top.value >= floor or believed

    top, next_D = space.top() if space.dimension else None, start_D
    while (top is None or not done(top)) and space.products < max_products and space.add(next_D):
        top = space.top()
        next_D = top.residual_D
    assert top is not None
    return Ritz(top.value, top.residual, space.products, _settled(top, tol), top.vector_D)


def _settled(top: RitzPair, tol: float) -> bool:
    """Whether residual^2 / gap, the error of a Ritz value, is what a residual of `tol` leaves at a gap of `GAP`."""
    size = abs(top.value)
    gap = min(max(top.value - top.second, LEAST_GAP * size), size)
    return top.residual**2 <= tol**2 * size * gap / GAP


def _turned(last_D: Tensor, vector_D: Tensor) -> bool:
    return abs(float(torch.dot(last_D, vector_D))) < TURNED


def _after(ritz: Ritz, track: Track) -> Track:
    if math.isnan(ritz.value):  # what is known of a broken model is worth nothing
        return Track(readings=track.readings + 1)
    return replace(track, readings=track.readings + 1, value=ritz.value, vector_D=ritz.vector_D)


def _unit(v_D: Tensor) -> Tensor:
    """v / |v|; zero for a vector that has no direction."""
    norm = v_D.norm()
    return torch.where((norm > 0) & norm.isfinite(), v_D / norm, torch.zeros_like(v_D))
