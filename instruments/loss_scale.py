"""What a GradScaler has done to `.grad` by the time that it is looked at."""

from collections.abc import Sequence
from typing import Any

from torch import optim


def loss_scale(scaler: Any, optimizers: Sequence[optim.Optimizer]) -> float:
    """By how much `.grad` is too large: the scaler's scale, or 1 once `unscale_` was called for this step.

    Whether it was called is known to the scaler alone; its per-optimizer stage is looked up without creating it.
    """
    if scaler is None or not scaler.is_enabled():
        return 1.0
    stages = [scaler._per_optimizer_states.get(id(o), {}).get("stage") for o in optimizers]
    if any(getattr(stage, "name", "") in ("UNSCALED", "STEPPED") for stage in stages):
        return 1.0
    return float(scaler.get_scale())


def skipped_inside(optimizer: optim.Optimizer) -> bool:
    """True when a fused optimizer ran its step but a GradScaler's found_inf made it a no-op."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
