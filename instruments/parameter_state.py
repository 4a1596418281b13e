"""What an optimizer keeps of each parameter, to be read and never written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, optim

from instruments.layout import Layout


@dataclass(frozen=True)
class ParameterState:
    """One trained parameter: its gradient (unscaled, None if there is none), the optimizer's state of it ({} before the
    first step), its parameter group, and that group's number over all optimizers."""

    name: str
    param: Tensor
    grad: Tensor | None
    state: Mapping[str, Any]
    group: Mapping[str, Any]
    group_number: int
    optimizer: optim.Optimizer


def parameter_states(
    optimizers: Sequence[optim.Optimizer], layout: Layout, grads: Sequence[Tensor | None]
) -> list[ParameterState]:
    """In the order of the layout; parameters that no optimizer holds are left out."""
    held: dict[int, tuple[optim.Optimizer, dict[str, Any], int]] = {}
    number = 0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                held[id(p)] = (optimizer, group, number)
            number += 1
    found = []
    for name, p, grad in zip(layout.names, layout.params, grads, strict=True):
        if id(p) in held:
            optimizer, group, index = held[id(p)]
            state = getattr(optimizer, "state", {}).get(p, {})  # never by [], which would create it
            found.append(ParameterState(name, p.detach(), grad, state, group, index, optimizer))
    return found
