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
REFUSED: Mapping[str, str] = {
    "Muon": "it orthogonalises its momentum, which is not linear in the gradient: no D makes rho = 1 its edge",
    "Rprop": "it uses the sign of the gradient alone: no D makes rho = 1 its edge",
    "LBFGS": "its step comes from a history of gradients and a line search, not from a fixed D",
    "SparseAdam": "coordinates that a batch does not touch keep their state, so the filter differs step by step",
}


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
    name = type(optimizer).__name__
    if name in REFUSED:
        raise Refusal(
            f"preconditioned sharpness is not defined for {name}: {REFUSED[name]}; read step/step_ratio instead."
        )
    known = ", ".join(sorted(cls.__name__ for cls in READERS))
    raise Refusal(
        f"no preconditioner reader for {name} (known: {known}); register one with instruments.preconditioners.reads."
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
    grad, lr, decay, shrink = _decayed(group, p, grad)
    beta1, beta2 = map(_number, group["betas"])
    t = _number(state.get("step", 0)) + 1
    v = _average(state.get("exp_avg_sq"), grad.square(), beta2)
    if group["amsgrad"] and "max_exp_avg_sq" in state:
        v = torch.maximum(v, state["max_exp_avg_sq"])
    denominator = (1 - beta1**t) * ((v / (1 - beta2**t)).sqrt() + group["eps"])
    return Scale(lr * _edge_gain(beta1) / (denominator * shrink), decay)


@reads(optim.RMSprop)
def rmsprop(group: Settings, state: Mapping[str, Any], p: Tensor, grad: Tensor) -> Scale:
    """p = sqrt(v) + eps without bias correction, sqrt(v - mean^2) + eps when centred; F(-1) = 1/(1 + mu)."""
    grad, lr, decay, _ = _decayed(group, p, grad)
    alpha = _number(group["alpha"])
    v = _average(state.get("square_avg"), grad.square(), alpha)
    if group["centered"]:
        v = v - _average(state.get("grad_avg"), grad, alpha).square()
    return Scale(lr / ((1 + _number(group["momentum"])) * (v.sqrt() + group["eps"])), decay)


@reads(optim.NAdam)
def nadam(group: Settings, state: Mapping[str, Any], p: Tensor, grad: Tensor) -> Scale:
    """p = sqrt(v / (1 - b2^t)) + eps. The direction mixes the gradient and its average with the cached momenta mu:
    F(-1) = (1 - mu_t)/(1 - prod mu) + mu_(t+1)/(1 - mu_(t+1) prod mu) (1 - b1)/(1 + b1)."""
    grad, lr, decay, shrink = _decayed(group, p, grad)
    beta1, beta2 = map(_number, group["betas"])
    t = _number(state.get("step", 0)) + 1
    mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (k * group["momentum_decay"])) for k in (t, t + 1))
    product = _number(state.get("mu_product", 1.0)) * mu
    gain = (1 - mu) / (1 - product) + mu_next / (1 - product * mu_next) * _edge_gain(beta1)
    v = _average(state.get("exp_avg_sq"), grad.square(), beta2)
    return Scale(lr * gain / (((v / (1 - beta2**t)).sqrt() + group["eps"]) * shrink), decay)


@reads(optim.RAdam)
def radam(group: Settings, state: Mapping[str, Any], p: Tensor, grad: Tensor) -> Scale:
    """p = (1 - b1^t)(sqrt(v) + eps)/(r_t sqrt(1 - b2^t)) with the rectification r_t, and 1 - b1^t while the variance
    of v is not known (length of the average at most 5); F(-1) as Adam."""
    grad, lr, decay, shrink = _decayed(group, p, grad)
    beta1, beta2 = map(_number, group["betas"])
    t = _number(state.get("step", 0)) + 1
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / (1 - beta2**t)
    denominator: Tensor | float = 1 - beta1**t
    if length > 5:
        top, bottom = (length - 4) * (length - 2) * longest, (longest - 4) * (longest - 2) * length
        v = _average(state.get("exp_avg_sq"), grad.square(), beta2)
        denominator = denominator * (v.sqrt() + group["eps"]) / math.sqrt((1 - beta2**t) * top / bottom)
    return Scale(lr * _edge_gain(beta1) / (denominator * shrink), decay)


@reads(optim.Adamax)
def adamax(group: Settings, state: Mapping[str, Any], p: Tensor, grad: Tensor) -> Scale:
    """p = (1 - b1^t) u with u = max(b2 u, |g| + eps); F(-1) as Adam."""
    grad, lr, decay, _ = _decayed(group, p, grad)
    beta1, beta2 = map(_number, group["betas"])
    t = _number(state.get("step", 0)) + 1
    u = grad.abs() + group["eps"]
    if "exp_inf" in state:
        u = torch.maximum(u, beta2 * state["exp_inf"])
    return Scale(lr * _edge_gain(beta1) / ((1 - beta1**t) * u), decay)


@reads(optim.Adagrad)
def adagrad(group: Settings, state: Mapping[str, Any], p: Tensor, grad: Tensor) -> Scale:
    """p = (sqrt(sum g^2) + eps)(1 + (t - 1) lr_decay); F(-1) = 1."""
    grad, lr, decay, _ = _decayed(group, p, grad)
    slowed = 1 + _number(state.get("step", 0)) * group["lr_decay"]
    return Scale(lr / (((state.get("sum", 0) + grad.square()).sqrt() + group["eps"]) * slowed), decay)


@reads(optim.Adadelta)
def adadelta(group: Settings, state: Mapping[str, Any], p: Tensor, grad: Tensor) -> Scale:
    """p = sqrt(v + eps)/sqrt(delta + eps), delta the average of squared steps before this one; F(-1) = 1."""
    grad, lr, decay, _ = _decayed(group, p, grad)
    v = _average(state.get("square_avg"), grad.square(), _number(group["rho"]))
    delta = torch.as_tensor(state.get("acc_delta", 0.0), dtype=p.dtype, device=p.device)
    return Scale(lr * ((delta + group["eps"]) / (v + group["eps"])).sqrt(), decay)


@reads(optim.Adafactor)
def adafactor(group: Settings, state: Mapping[str, Any], p: Tensor, grad: Tensor) -> Scale:
    """D = alpha / (clip sqrt(v)), alpha = max(eps2, rms(x)) min(lr, t^-1/2), clip = max(1, rms(g / sqrt(v)) / d), v
    factored into rows and columns for matrices; decoupled decay; F(-1) = 1. alpha and clip are held fixed with v."""
    t = _number(state.get("step", 0)) + 1
    forget, eps1 = t ** group["beta2_decay"], group["eps"][0] or torch.finfo(p.dtype).eps
    square = grad.square()
    if grad.dim() > 1:
        row = _average(state.get("row_var"), square.mean(-1, keepdim=True), 1 - forget)
        column = _average(state.get("col_var"), square.mean(-2, keepdim=True), 1 - forget)
        v = row @ column / row.mean(-2, keepdim=True).clamp(min=eps1)
    else:
        v = _average(state.get("variance"), square, 1 - forget)
    root = v.clamp(min=eps1 * eps1).sqrt()
    lr = _number(group["lr"])
    alpha = p.square().mean().sqrt().clamp(min=group["eps"][1]) * min(lr, t**-0.5)
    clip = ((grad / root).square().mean().sqrt() / group["d"]).clamp(min=1.0)
    return Scale(alpha / (clip * root * (1 - lr * _number(group["weight_decay"]) / 2)))


def _decayed(group: Settings, p: Tensor, grad: Tensor) -> tuple[Tensor, float, float, float]:
    """The gradient with coupled decay added, learning rate, coupled decay c, and 1 - omega/2 for decoupled decay."""
    lr, decay = _number(group["lr"]), _number(group["weight_decay"])
    if group.get("decoupled_weight_decay", False):
        return grad, lr, 0.0, 1 - lr * decay / 2
    return (grad + decay * p if decay else grad), lr, decay, 1.0


def _average(old: Tensor | None, new: Tensor, beta: float) -> Tensor:
    """beta old + (1 - beta) new, from zero where there is no old one."""
    return (1 - beta) * new if old is None else beta * old + (1 - beta) * new


def sharpness_edge(preconditioner: Preconditioner, factor: float = 1.0) -> float:
    """The top eigenvalue of the Hessian at which rho = 1: (2/D - c) / factor, where D and c are the same everywhere.

    NaN where they are not (Adam, several learning rates): then no sharpness alone is the edge. 2/eta for plain SGD.
    """
    moved_D = preconditioner.scale_D > 0  # not so for a parameter that the loss does not reach
    if not bool(moved_D.any()):
        return math.nan
    steps, decays = preconditioner.scale_D[moved_D].aminmax(), preconditioner.decay_D[moved_D].aminmax()
    d0, d1, c0, c1 = (float(x) for x in (*steps, *decays))
    return (2 / d0 - c0) / factor if d0 == d1 > 0 and c0 == c1 else math.nan


def headroom(rho: float) -> float:
    """How many times the learning rates could grow before rho = 1; infinite where curvature does not limit them."""
    return math.inf if rho <= 0 else 1 / rho
