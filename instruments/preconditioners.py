"""What an optimizer multiplies the gradient with, coordinate by coordinate, at the edge of stability.

For an update  x+ = (1 - omega) x - (eta / p) F[g],  g = (H + diag c) x,  with learning rate eta, momentum filter F,
preconditioner p, decoupled decay omega = eta * weight_decay and coupled (L2) decay c, a direction whose sign alternates
every step meets the gain F(-1), and

    D_i = eta_i F_i(-1) / (p_i (1 - omega_i / 2)),     rho = 1/2 lambda_max( D^1/2 (H + diag c) D^1/2 ).

With p held fixed and H positive definite the iteration decays exactly when rho < 1, for any mix of parameter groups.
Known cases: gradient descent 2/eta, heavy ball (2 + 2 mu)/eta (Cohen et al. 2021, "Gradient descent on neural networks
typically occurs at the edge of stability"), Adam 38/eta at beta1 = 0.9 (Cohen et al. 2022, "Adaptive gradient methods
at the edge of stability").

p is read after the second moment has taken in the gradient that stands in `.grad`, on copies: it is the one of the
step about to be taken, and exists at the first step. Optimizer state is never written, nor created.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, optim

from instruments.layout import Layout
from instruments.refusal import Refusal


@dataclass(frozen=True)
class Scale:
    """One parameter's D (broadcastable to it) and coupled decay c."""

    step_size: Tensor | float
    decay: float = 0.0


@dataclass(frozen=True)
class Preconditioner:
    """D and c over the trainable parameters, shape (D,) each, and which parameter group each parameter is in.

    A trainable parameter that no optimizer holds has D = 0 and group -1.
    """

    scale_D: Tensor
    decay_D: Tensor
    group_of: tuple[int, ...]
    groups: int


Settings = Mapping[str, Any]
Reader = Callable[[Settings, Mapping[str, Any], Tensor, Tensor], Scale]
"""(parameter group, state of the parameter or {}, parameter, its gradient) -> Scale."""

READERS: dict[type[optim.Optimizer], Reader] = {}


def reads(*classes: type[optim.Optimizer]) -> Callable[[Reader], Reader]:
    """Register the reader of an optimizer class; a subclass is read by it while it does not override `step`."""

    def register(reader: Reader) -> Reader:
        for cls in classes:
            READERS[cls] = reader
        return reader

    return register


def reader_of(optimizer: optim.Optimizer) -> Reader:
    """The registered reader, or a Refusal: an unknown update rule is never guessed."""
    for cls in type(optimizer).__mro__:
        if cls in READERS:
            if inspect.unwrap(type(optimizer).step) is inspect.unwrap(cls.step):
                return READERS[cls]
            raise Refusal(
                f"{type(optimizer).__name__} overrides the step of {cls.__name__}, so its preconditioner is unknown; "
                "register a reader for it with instruments.preconditioners.reads."
            )
    known = ", ".join(sorted(cls.__name__ for cls in READERS))
    raise Refusal(
        f"no preconditioner reader for {type(optimizer).__name__} (known: {known}); "
        "register one with instruments.preconditioners.reads."
    )


@torch.no_grad()
def read_preconditioner(
    optimizers: Sequence[optim.Optimizer], layout: Layout, grads: Sequence[Tensor | None]
) -> Preconditioner:
    """D and c of the step about to be taken. `grads` are the gradients in the order of the layout, unscaled."""
    index = {id(p): i for i, p in enumerate(layout.params)}
    scales: list[Tensor | None] = [None] * len(layout.params)
    decays: list[Tensor | None] = [None] * len(layout.params)
    group_of = [-1] * len(layout.params)
    number = 0
    for optimizer in optimizers:
        reader = reader_of(optimizer)
        for group in optimizer.param_groups:
            if group.get("maximize"):
                raise Refusal("the optimizer maximizes its objective; sharpness of an ascent is not defined here.")
            for p in group["params"]:
                i = index.get(id(p))
                grad = None if i is None else grads[i]
                if i is None or grad is None:
                    continue
                scale = reader(group, optimizer.state.get(p, {}), p, _dense(grad))
                scales[i] = torch.as_tensor(scale.step_size, dtype=p.dtype, device=p.device).expand_as(p)
                decays[i] = torch.full_like(p, scale.decay)
                group_of[i] = number
            number += 1
    return Preconditioner(layout.join(scales), layout.join(decays), tuple(group_of), number)


def _dense(grad: Tensor) -> Tensor:
    return grad if grad.layout is torch.strided else grad.to_dense()


def _number(value: Any) -> float:
    return float(value)


def _edge_gain(beta: float) -> float:
    """F(-1) of an exponential moving average: (1 - beta) / (1 + beta)."""
    return (1 - beta) / (1 + beta)


@reads(optim.SGD)
def sgd(group: Settings, state: Mapping[str, Any], p: Tensor, grad: Tensor) -> Scale:
    """F(-1) = (1 - d)/(1 + mu) for heavy ball with dampening d, (1 + mu (1 - d)/(1 + mu)) for Nesterov, d = 0 there."""
    mu, dampening = _number(group["momentum"]), _number(group["dampening"])
    gain = 1.0 if mu == 0 else (1 - dampening) / (1 + mu)
    if mu and group["nesterov"]:
        gain = (1 + 2 * mu) / (1 + mu)
    return Scale(_number(group["lr"]) * gain, _number(group["weight_decay"]))


@reads(optim.Adam, optim.AdamW)
def adam(group: Settings, state: Mapping[str, Any], p: Tensor, grad: Tensor) -> Scale:
    """p = (1 - b1^t)(sqrt(v / (1 - b2^t)) + eps), with max v for AMSGrad; F(-1) = (1 - b1)/(1 + b1)."""
    lr, decay = _number(group["lr"]), _number(group["weight_decay"])
    beta1, beta2 = map(_number, group["betas"])
    decoupled = bool(group.get("decoupled_weight_decay", False))
    t = _number(state.get("step", 0)) + 1
    if not decoupled and decay:
        grad = grad + decay * p
    v = (1 - beta2) * grad.square()
    if "exp_avg_sq" in state:
        v = v + beta2 * state["exp_avg_sq"]
    if group["amsgrad"] and "max_exp_avg_sq" in state:
        v = torch.maximum(v, state["max_exp_avg_sq"])
    denominator = (1 - beta1**t) * ((v / (1 - beta2**t)).sqrt() + group["eps"])
    shrink = 1 - lr * decay / 2 if decoupled else 1.0
    return Scale(lr * _edge_gain(beta1) / (denominator * shrink), 0.0 if decoupled else decay)


@reads(optim.RMSprop)
def rmsprop(group: Settings, state: Mapping[str, Any], p: Tensor, grad: Tensor) -> Scale:
    """p = sqrt(v) + eps without bias correction, sqrt(v - mean^2) + eps when centred; F(-1) = 1/(1 + mu)."""
    alpha, decay = _number(group["alpha"]), _number(group["weight_decay"])
    if decay:
        grad = grad + decay * p
    v = (1 - alpha) * grad.square()
    if "square_avg" in state:
        v = v + alpha * state["square_avg"]
    if group["centered"]:
        mean = (1 - alpha) * grad
        if "grad_avg" in state:
            mean = mean + alpha * state["grad_avg"]
        v = v - mean.square()
    gain = 1 / (1 + _number(group["momentum"]))
    return Scale(_number(group["lr"]) * gain / (v.sqrt() + group["eps"]), decay)


def headroom(rho: float) -> float:
    """How many times the learning rates could grow before rho = 1; infinite where curvature does not limit them."""
    return math.inf if rho <= 0 else 1 / rho
