"""The top eigenvalue of an operator that changes a little from reading to reading.

A reading starts from the last Ritz vector, which costs two or three products instead of six to eight. What that can
miss is an eigenvalue that has overtaken the tracked one along a direction the start does not contain: the residual is
small, the answer is an eigenvalue, and it is not the largest. Three measures against it:

- a few cheap products of a sample of the examples (`Operator.sampled`) look where the top eigenvector is now, from the
  last one, the gradient and a little chance; the start contains what they find. Where the sample has two eigenvalues
  about as large, or finds another direction than the last one, both of its vectors are tried. Without a sample the
  start contains the gradient, which is rich in directions of high curvature, and a little of a random vector;
- a value that fell by more than `DROP` since the last reading is doubted: more products, and a smaller residual, before
  it is believed;
- the first readings after the first, and every `AUDIT_EVERY`-th, are audited: a second iteration from a fresh start,
  and the larger of the two answers counts (both are lower bounds, so the larger is the better).

The error of a Ritz value is about residual^2 / gap, with the gap to the next eigenvalue, which the sample and the
subspace estimate. With a sample readings stop where that is small enough (`_settled`).

Products that another instrument has taken of the same matrix at this step are used first: under SGD, where rho is the
sharpness times a number, it then costs none.

Shapes: D = size of the operator.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from instruments.linalg.lanczos import DOUBTED_PRODUCTS, DOUBTED_TOL, Ritz, krylov_spaces, top_eigenvalue
from instruments.linalg.subspace import RitzPair, Subspace
from instruments.operators.operator import Operator, random_unit

HINT, RANDOM = 0.2, 0.02  # weights in a warm start, against 1 for the last Ritz vector
FRESH_RANDOM = 0.5  # weight of the random vector in a fresh start, against 1 for the hint
FRESH_TOL = 0.03
YOUNG, AUDIT_EVERY, DROP = 3, 10, 0.2
LOOK_HINT, LOOK_RANDOM, LOOKS, LOOK_TOL = 0.5, 0.2, 8, 0.02  # the iteration on the sample
TIE, TURNED = (
    0.9,
    0.7,
)  # ratio of its eigenvalues above which, and cosine with the last vector below which, two are tried
GAP, LEAST_GAP = 0.2, 0.05  # of the value: where `tol` is a plain tolerance, and the smallest that is reckoned with


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
    space = Subspace(operator)
    for pair in operator.known():
        space.add(*pair)
    if space.dimension > 1 and _settled(best := space.top(), best.second, tol) and best.value >= floor:
        ritz = Ritz(best.value, best.residual, 0, True, best.vector_D)
    elif (sample := operator.sampled()) is not None:
        look_D = last_D + LOOK_HINT * sign * hint_D + LOOK_RANDOM * noise_D
        ritz = _scouted(space, _look(sample, look_D, sample.price / operator.price), last_D, tol, max_products, floor)
    else:
        ritz = top_eigenvalue(operator, start_D, tol=tol, max_products=max_products, doubt_below=floor)
    if track.readings < YOUNG or track.readings % AUDIT_EVERY == 0:
        audit = top_eigenvalue(operator, fresh_D, tol=fresh_tol, max_products=max_products)
        better = audit if audit.value > ritz.value else ritz
        ritz = replace(better, products=ritz.products + audit.products)
    return ritz, _remember(ritz, track.readings + 1)


@dataclass(frozen=True)
class Look:
    """The two top Ritz vectors of a sample, the ratio of their values, and what they cost in products of the whole."""

    vector_D: Tensor
    next_D: Tensor | None
    ratio: float
    products: float


def _look(sample: Operator, start_D: Tensor, share: float) -> Look | None:
    for krylov in krylov_spaces(sample, start_D, min(LOOKS, sample.size)):
        k = len(krylov.alphas)
        if not krylov.finite:
            return None
        values_k, s_kk = eigh_tridiagonal(np.array(krylov.alphas), np.array(krylov.betas))
        met = krylov.beta * abs(s_kk[-1, -1]) <= LOOK_TOL * abs(values_k[-1])
        if (met and k >= LOOKS / 2) or krylov.exhausted(float(np.abs(values_k).max())):
            break
    rows = torch.as_tensor(s_kk.T[::-1].copy(), dtype=sample.dtype, device=sample.device) @ krylov.basis_kD
    ratio = float(values_k[-2] / values_k[-1]) if k > 1 and values_k[-1] > 0 else 0.0
    return Look(rows[0], rows[1] if k > 1 else None, ratio, k * share)


def _scouted(space: Subspace, look: Look | None, last_D: Tensor, tol: float, max_products: int, floor: float) -> Ritz:
    """From the last vector and what the look has found; each further product is of the residual."""
    start_D, ratio, looked = last_D, 0.0, 0.0
    if look is not None:
        cosine = torch.dot(last_D, look.vector_D)
        start_D, ratio, looked = last_D + torch.where(cosine < 0, -1.0, 1.0) * look.vector_D, look.ratio, look.products
    space.add(start_D)
    if look is not None and look.next_D is not None and (ratio > TIE or abs(float(cosine)) < TURNED):
        space.add(look.next_D)
    while True:
        pair = space.top()
        doubted = pair.value < floor and space.products < DOUBTED_PRODUCTS and pair.residual > DOUBTED_TOL * pair.value
        settled = _settled(pair, max(pair.second, ratio * pair.value), tol) and space.dimension > 1 and not doubted
        if settled or math.isnan(pair.value) or space.products >= max_products or not space.add(pair.residual_D):
            return Ritz(pair.value, pair.residual, space.products + looked, settled, pair.vector_D)


def _settled(pair: RitzPair, second: float, tol: float) -> bool:
    """Whether residual^2 / gap, the error of a Ritz value, is what a residual of `tol` leaves at a gap of `GAP`."""
    size = abs(pair.value)
    gap = max(pair.value - second, LEAST_GAP * size)
    return pair.residual**2 <= tol**2 * size * gap / GAP


def _remember(ritz: Ritz, readings: int) -> Track:
    if math.isnan(ritz.value):  # what is known of a broken model is worth nothing
        return Track(readings=readings)
    return Track(readings, ritz.value, ritz.vector_D)


def _unit(v_D: Tensor) -> Tensor:
    """v / |v|; zero for a vector that has no direction."""
    norm = v_D.norm()
    return torch.where((norm > 0) & norm.isfinite(), v_D / norm, torch.zeros_like(v_D))
