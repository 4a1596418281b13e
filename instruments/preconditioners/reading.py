"""D and c of all optimizers of a step, as one vector each.

Shapes: D = trainable scalars.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from instruments.layout import Layout
from instruments.preconditioners.basis import Basis, Rotation
from instruments.preconditioners.registry import Scale, reader_of
from instruments.refusal import Refusal


@dataclass(frozen=True)
class Preconditioner:
    """D = Q diag(scale) Q' and c over the trainable parameters, and which parameter group each parameter is in.

    `scale_D` and `decay_D` have shape (D,); `scale_D` is in the coordinates of `basis`, which are those of the
    parameters unless an optimizer says otherwise. A trainable parameter that no optimizer holds has D = 0 and group -1.
    D is 0 as well for the share `unheard` of all coordinates (a scalar), which no gradient has reached so far.
    """

    scale_D: Tensor
    decay_D: Tensor
    group_of: tuple[int, ...]
    groups: int
    basis: Basis
    unheard: Tensor

    def times(self, v_D: Tensor) -> Tensor:
        """D v, the step that an alternating gradient v would make."""
        return self.basis.back(self.scale_D * self.basis.into(v_D))

    def root_times(self, v_D: Tensor) -> Tensor:
        """R'v for D = R R', R = Q diag(scale)^1/2: v in the coordinates of D^1/2 H D^1/2."""
        return self.scale_D.sqrt() * self.basis.into(v_D)


@torch.no_grad()
def read_preconditioner(optimizers: Sequence[Any], layout: Layout, grads: Sequence[Tensor | None]) -> Preconditioner:
    """D and c of the step about to be taken. `grads` are the gradients in the order of the layout, unscaled.

    A parameter without a gradient will not be stepped on: D is 0 there, as it is where the second moment is zero. Such
    coordinates do not move, and if a gradient reaches them one day p will not be the eps that it is now: units that no
    batch of training has made fire, but one of the probe does, would read as a curvature of 1/eps. Raises Refusal where
    no parameter has a gradient.
    """
    if all(g is None for g in grads):
        raise Refusal(
            "expected a step about to be taken, but no parameter has a gradient, so the optimizer would move none; "
            "read between backward() and zero_grad(). Otherwise rho would be 0 whatever the learning rate."
        )
    index = {id(p): i for i, p in enumerate(layout.params)}
    scales: list[Tensor | None] = [None] * len(layout.params)
    decays: list[Tensor | None] = [None] * len(layout.params)
    rotations: dict[int, Rotation] = {}
    group_of = [-1] * len(layout.params)
    unheard: dict[int, Tensor] = {}
    number = 0
    for optimizer in optimizers:
        reader, states = reader_of(optimizer), getattr(optimizer, "state", {})
        for group in optimizer.param_groups:
            if group.get("maximize"):
                raise Refusal(
                    "the optimizer maximizes its objective; sharpness of an ascent is not defined here. Minimise the "
                    "negative of it to have rho."
                )
            for p in group["params"]:
                i = index.get(id(p))
                grad = None if i is None else grads[i]
                if i is None or grad is None:
                    continue
                state, grad = states.get(p, {}), _dense(grad)
                scale = reader(group, state, p, grad)
                silent = _silent(scale, state, grad)
                scales[i], rotation = _placed(scale, silent, p, layout.names[i], layout.dtype)
                if silent is not None:
                    unheard[i] = silent.sum().to(layout.device)
                if rotation is not None:
                    rotations[i] = rotation
                decays[i] = torch.as_tensor(scale.decay, dtype=layout.dtype, device=p.device).expand_as(p)
                group_of[i] = number
            number += 1
    basis = Basis(tuple(p.numel() for p in layout.params), rotations)
    count = sum(unheard.values(), torch.zeros((), device=layout.device))
    share = count / layout.size
    return Preconditioner(layout.join(scales), layout.join(decays), tuple(group_of), number, basis, share)


def _silent(scale: Scale, state: Mapping[str, Any], grad: Tensor) -> Tensor | None:
    """Where the second moment is zero, and not because the square of a gradient is too small for half precision: then
    neither the gradient nor its average is zero. None for an optimizer without such a moment."""
    if scale.second_moment is None:
        return None
    silent = scale.second_moment == 0
    if scale.basis is not None:
        return silent
    average = state.get("exp_avg")
    silent = silent & (grad == 0)
    return silent if average is None else silent & (average == 0)


def _placed(
    scale: Scale, silent: Tensor | None, p: Tensor, name: str, dtype: torch.dtype
) -> tuple[Tensor, Rotation | None]:
    """The step sizes in as many scalars as the parameter has, zero where they are silent, and the basis that they are
    in."""
    step_size = torch.as_tensor(scale.step_size, dtype=dtype, device=p.device)
    step_size = step_size.expand_as(p) if scale.basis is None else step_size
    if silent is not None:
        step_size = step_size.masked_fill(silent, 0.0)
    if scale.basis is None:
        return step_size, None
    return step_size, Rotation.of(name, step_size, p.numel(), scale.basis)


def _dense(grad: Tensor) -> Tensor:
    return grad if grad.layout is torch.strided else grad.to_dense()


def sharpness_edge(preconditioner: Preconditioner, factor: float = 1.0) -> float:
    """The top eigenvalue of the Hessian at which rho = 1: (2/D - c) / factor, where D and c are the same everywhere.

    NaN where they are not (Adam, several learning rates): then no sharpness alone is the edge. 2/eta for plain SGD.
    """
    moved_D = preconditioner.scale_D > 0  # not so for a parameter that the loss does not reach
    if not bool(moved_D.any()):
        return math.nan
    decay_D = preconditioner.decay_D if preconditioner.basis.rotations else preconditioner.decay_D[moved_D]
    steps, decays = preconditioner.scale_D[moved_D].aminmax(), decay_D.aminmax()
    d0, d1, c0, c1 = (float(x) for x in (*steps, *decays))
    return (2 / d0 - c0) / factor if d0 == d1 > 0 and c0 == c1 else math.nan


def headroom(rho: float) -> float:
    """How many times the learning rates could grow before rho = 1; infinite where curvature does not limit them."""
    return math.inf if rho <= 0 else 1 / rho
