"""The top eigenvalue of an operator that changes a little from reading to reading.

A reading starts Lanczos from the last Ritz vector, which costs two or three products instead of six to eight. What that
can miss is an eigenvalue that has overtaken the tracked one along a direction the start does not contain: the residual
is small, the answer is an eigenvalue, and it is not the largest. Three measures against it:

- the start contains the gradient, which is rich in directions of high curvature, and a little of a random vector;
- a reading that fell by more than `DROP` since the last one is audited: a second iteration from a fresh start, and the
  larger of the two answers counts (both are lower bounds, so the larger is the better);
- the first readings after the first, and every `AUDIT_EVERY`-th, are audited whatever they say.

Shapes: D = size of the operator.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from instruments.linalg.lanczos import Ritz, random_start, top_eigenvalue
from instruments.operators.operator import Operator

HINT, RANDOM = 0.1, 0.02  # weights in a warm start, against 1 for the last Ritz vector
AUDIT_RANDOM = 0.5  # weight of the random vector in an audit's start, against 1 for the hint
AUDIT_EVERY, YOUNG, DROP = 10, 3, 0.16
AUDIT_TOL = 0.03


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
    noise_D = random_start(operator, seed)
    hint_D = _unit(hint_D)
    last_D = track.vector_D
    if last_D is None or last_D.shape[0] != operator.size:
        ritz = top_eigenvalue(operator, noise_D + hint_D, tol=min(tol, AUDIT_TOL), max_products=max_products)
        return ritz, _remember(ritz, 1)
    last_D = last_D.to(operator.device, operator.dtype)
    sign = torch.where(torch.dot(hint_D, last_D) < 0, -1.0, 1.0)
    start_D = last_D + HINT * sign * hint_D + RANDOM * noise_D
    ritz = top_eigenvalue(operator, start_D, tol=tol, max_products=max_products)
    fell = ritz.value < (1 - DROP) * track.value
    if fell or track.readings < YOUNG or track.readings % AUDIT_EVERY == 0:
        fresh = hint_D + AUDIT_RANDOM * noise_D
        audit = top_eigenvalue(operator, fresh, tol=min(tol, AUDIT_TOL), max_products=max_products)
        better = audit if audit.value > ritz.value else ritz
        ritz = replace(better, products=ritz.products + audit.products)
    return ritz, _remember(ritz, track.readings + 1)


def _remember(ritz: Ritz, readings: int) -> Track:
    if math.isnan(ritz.value):  # what is known of a broken model is worth nothing
        return Track(readings=readings)
    return Track(readings, ritz.value, ritz.vector_D)


def _unit(v_D: Tensor) -> Tensor:
    """v / |v|; zero for a vector that has no direction."""
    norm = v_D.norm()
    return torch.where((norm > 0) & norm.isfinite(), v_D / norm, torch.zeros_like(v_D))
