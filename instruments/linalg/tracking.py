"""The top eigenvalue of an operator that changes a little from reading to reading.

A reading starts Lanczos from the last Ritz vector, which costs two or three products instead of six to eight. What that
can miss is an eigenvalue that has overtaken the tracked one along a direction the start does not contain: the residual
is small, the answer is an eigenvalue, and it is not the largest. Three measures against it:

- the start contains the gradient, which is rich in directions of high curvature, and a little of a random vector;
- a value that fell by more than `DROP` since the last reading is doubted: the iteration goes on for more products and a
  smaller residual before it is believed;
- the first readings after the first, and every `AUDIT_EVERY`-th, are audited: a second iteration from a fresh start,
  and the larger of the two answers counts (both are lower bounds, so the larger is the better).

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
from instruments.linalg.subspace import top_ritz_pair
from instruments.operators.operator import Operator, random_unit

HINT, RANDOM = 0.2, 0.02  # weights in a warm start, against 1 for the last Ritz vector
FRESH_RANDOM = 0.5  # weight of the random vector in a fresh start, against 1 for the hint
FRESH_TOL = 0.03
YOUNG, AUDIT_EVERY, DROP = 3, 10, 0.14


@dataclass(frozen=True)
class Track:
    """What is kept between readings. `readings` counts them; `value` and `vector_D` are the last answer."""

    readings: int = 0
    value: float = 0.0
    vector_D: Tensor | None = None

    def state(self) -> dict[str, Any]:
        return {"readings": self.readings, "value": self.value, "vector_D": self.vector_D}


def follow(
    operator: Operator, track: Track, hint_D: Tensor, *, tol: float, max_products: int, seed: int
) -> tuple[Ritz, Track]:
    """One reading and the memory for the next. `hint_D` is a direction likely to be sharp (the gradient).

    Costs are in `Ritz.products`, audits included. A vector of another size (the model grew, another parameter was
    frozen) starts cold.
    """
    noise_D, hint_D = random_unit(operator, seed), _unit(hint_D)
    fresh_tol = min(tol, FRESH_TOL)
    fresh_D = hint_D + FRESH_RANDOM * noise_D
    last_D = track.vector_D
    if last_D is None or last_D.shape[0] != operator.size:
        ritz = top_eigenvalue(operator, fresh_D, tol=fresh_tol, max_products=max_products)
        return ritz, _remember(ritz, 1)
    last_D = last_D.to(operator.device, operator.dtype)
    sign = torch.where(torch.dot(hint_D, last_D) < 0, -1.0, 1.0)
    start_D = last_D + HINT * sign * hint_D + RANDOM * noise_D
    floor = (1 - DROP) * track.value
    ritz = _from_products_of_others(operator, tol, floor) or top_eigenvalue(
        operator, start_D, tol=tol, max_products=max_products, doubt_below=floor
    )
    if track.readings < YOUNG or track.readings % AUDIT_EVERY == 0:
        audit = top_eigenvalue(operator, fresh_D, tol=fresh_tol, max_products=max_products)
        better = audit if audit.value > ritz.value else ritz
        ritz = replace(better, products=ritz.products + audit.products)
    return ritz, _remember(ritz, track.readings + 1)


def _from_products_of_others(operator: Operator, tol: float, floor: float) -> Ritz | None:
    """The answer, where what was computed of the same operator at this step gives it within the tolerance already."""
    pair = top_ritz_pair(operator.known())
    if pair is None or pair.value < floor or pair.residual > tol * abs(pair.value):
        return None
    return Ritz(pair.value, pair.residual, 0, True, pair.vector_D)


def _remember(ritz: Ritz, readings: int) -> Track:
    if math.isnan(ritz.value):  # what is known of a broken model is worth nothing
        return Track(readings=readings)
    return Track(readings, ritz.value, ritz.vector_D)


def _unit(v_D: Tensor) -> Tensor:
    """v / |v|; zero for a vector that has no direction."""
    norm = v_D.norm()
    return torch.where((norm > 0) & norm.isfinite(), v_D / norm, torch.zeros_like(v_D))
