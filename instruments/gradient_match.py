"""Is the loss that is measured the loss that is trained? The recomputed gradient against `.grad`."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from instruments.refusal import Refusal
from instruments.running import processes

if TYPE_CHECKING:
    from instruments.probe import Probe

EQUAL, SAME_DIRECTION = 1e-3, 0.999
LEFT_OVER = 0.5  # of the gradient: what those of earlier steps, never zeroed, exceed
UNDER_MASKS = 0.15  # of a factor, where two gradients have other random masks


@dataclass(frozen=True)
class GradientMatch:
    """`cosine` between `.grad` and the recomputed gradient, `ratio` of their norms, and what follows from them.

    `factor` is by how much the loss that is trained is larger than the loss that was given, where that is known to be
    the same at every step: k, when k accumulated losses are added instead of averaged.
    """

    verdict: Literal["equal", "explained", "unexplained"]
    cosine: float
    ratio: float
    reason: str
    factor: float = 1.0


def compare_gradient(probe: "Probe", accumulate: int, *, was_equal: bool = False) -> GradientMatch:
    """Costs one gradient on the step's batch. `was_equal` says that they were at an earlier step: an altogether other
    `.grad` by now is one that was not zeroed in between.

    Different: random masks (cannot be compared), a constant factor (accumulation, loss scale, clipping before observe,
    a summed loss), clipping by value, micro-batches of unequal size that count alike, an average over processes. A
    difference in direction that none of these explains is the user's to mend.
    """
    _, recomputed_D, random = probe.loss_and_gradient()
    stored_D = probe.layout.join(probe.unscaled_grads)
    norms = torch.stack([stored_D.norm(), recomputed_D.norm(), torch.dot(stored_D, recomputed_D)]).double().tolist()
    stored, recomputed, dot = norms
    if not all(map(math.isfinite, norms)):
        return GradientMatch("explained", float("nan"), float("nan"), "the gradient is not finite")
    if stored == 0 or recomputed == 0:
        if stored == recomputed:
            return GradientMatch("equal", 1.0, 1.0, "")
        raise Refusal(f"one gradient is zero: |.grad| = {stored:.3g}, recomputed {recomputed:.3g}")
    cosine, ratio = dot / (stored * recomputed), stored / recomputed
    # Rounding (autocast) that turns the vector by an angle may stretch it as much.
    angle = math.sqrt(max(0.0, 2 - 2 * cosine))
    if cosine > SAME_DIRECTION and abs(ratio - 1) < EQUAL + angle:
        return GradientMatch("equal", cosine, ratio, "")
    if random:
        reason, factor = _masked(cosine, ratio, accumulate)
    elif was_equal and not (cosine > SAME_DIRECTION and ratio < 1):
        reason, factor = _since(cosine, ratio), 1.0
    elif cosine > SAME_DIRECTION:
        reason, factor = _stretched(ratio, accumulate)
    else:
        reason, factor = _turned(probe, stored_D, recomputed_D, accumulate)
    if reason:
        return GradientMatch("explained", cosine, ratio, reason, factor)
    return GradientMatch("unexplained", cosine, ratio, _unexplained(cosine, ratio, was_equal))


def _since(cosine: float, ratio: float) -> str:
    """Why two that were equal no longer are, where gradients that were left in .grad are too little an explanation."""
    if math.sqrt(max(0.0, 1 + ratio**2 - 2 * ratio * cosine)) > LEFT_OVER:
        return ""
    return (
        f".grad was the gradient of the loss at an earlier step, and nearly is now (cosine {cosine:.4f}): half "
        "precision, or a forward that carries something from pass to pass (spectral norm does)"
    )


def _unexplained(cosine: float, ratio: float, was_equal: bool) -> str:
    found = f"the gradient of the loss given to the cockpit is not .grad (cosine {cosine:.3f}, .grad {ratio:.3g} times "
    others = (
        "the loss given is not the loss trained, the batch passed to observe() is not the one that backward() saw, or "
        "observe() was called after the optimizer's step. "
        "Every reading of curvature, noise and step describes the loss that was given."
    )
    if was_equal:
        return (
            f"{found}as long), and it was at an earlier step: gradients of steps before are left in .grad, if "
            "optimizer.zero_grad() is not called once a step; several backward passes make one step, if "
            f"accumulate=... was not told. Or {others}"
        )
    return f"{found}as long): {others}"


def _added(ratio: float, accumulate: int, within: float = 1e-2) -> bool:
    return accumulate > 1 and abs(ratio / accumulate - 1) < within


def _sum_of(accumulate: int, ratio: float) -> str:
    return f"the {accumulate} accumulated losses were added, not averaged: .grad is {ratio:.4g} times their mean"


def _masked(cosine: float, ratio: float, accumulate: int) -> tuple[str, float]:
    """Under other random masks neither direction nor length is the same; that losses were added shows all the same."""
    if cosine > 0.5 and _added(ratio, accumulate, UNDER_MASKS):
        return f"{_sum_of(accumulate, ratio)} (compared under other random masks)", float(accumulate)
    return "the forward draws random numbers (dropout): other masks", 1.0


def _stretched(ratio: float, accumulate: int) -> tuple[str, float]:
    """Why .grad is longer or shorter, and the factor of losses that were added."""
    if _added(ratio, accumulate):
        return _sum_of(accumulate, ratio), float(accumulate)
    times = f".grad is {ratio:.4g} times the gradient of the loss"
    if ratio > 1:
        return f"{times}: a loss scale (pass scaler=...) or a summed loss", 1.0
    return f"{times}: clipped before observe(), or the loss was divided", 1.0


def _turned(probe: "Probe", stored_D: Tensor, recomputed_D: Tensor, accumulate: int) -> tuple[str, float]:
    """Why .grad points elsewhere, empty when nothing explains it, and the factor of losses that were added."""
    if _clipped_by_value(stored_D, recomputed_D):
        return "the elements of .grad were clipped before observe()", 1.0
    if accumulate > 1:
        alike_D = probe.loss_and_gradient(weighted=False)[1]
        if torch.dot(stored_D, alike_D) > SAME_DIRECTION * stored_D.norm() * alike_D.norm():
            ratio = float(stored_D.norm() / alike_D.norm())
            reason = "micro-batches count alike in .grad, and by their size in the loss of the step"
            if _added(ratio, accumulate):
                return f"{_sum_of(accumulate, ratio)}; {reason}", float(accumulate)
            return f"the {reason}", 1.0
    if (count := processes()) > 1:
        return f".grad may be averaged over {count} processes, of which each sees its own batch", 1.0
    return "", 1.0


def _clipped_by_value(stored_D: Tensor, recomputed_D: Tensor) -> bool:
    limit = stored_D.abs().max()
    clipped_D = recomputed_D.clamp(-limit, limit)
    return bool(recomputed_D.abs().max() > limit) and bool((stored_D - clipped_D).norm() < 1e-2 * clipped_D.norm())
