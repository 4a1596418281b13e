"""The readers of torch's own optimizers, as torch computes them.

A setting may be a number or a tensor; the variants over lists of tensors, fused and capturable, keep the same state.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, optim

from instruments.preconditioners.registry import Scale, Settings, average, edge_gain, reads


@reads(optim.SGD)
def sgd(group: Settings, state: Mapping[str, Any], p: Tensor, grad: Tensor) -> Scale:
    """F(-1) = (1 - d)/(1 + mu) for heavy ball with dampening d, (1 + mu (1 - d)/(1 + mu)) for Nesterov, d = 0 there."""
    mu, dampening = float(group["momentum"]), float(group["dampening"])
    gain = 1.0 if mu == 0 else (1 - dampening) / (1 + mu)
    if mu and group["nesterov"]:
        gain = (1 + 2 * mu) / (1 + mu)
    return Scale(float(group["lr"]) * gain, float(group["weight_decay"]))


@reads(optim.ASGD)
def asgd(group: Settings, state: Mapping[str, Any], p: Tensor, grad: Tensor) -> Scale:
    """D = eta_t / (1 - lambd eta_t / 2), eta_t as its own decay has left it, lambd decoupled; F(-1) = 1. The average
    that it keeps of the parameters plays no part in its steps."""
    lr = float(state.get("eta", group["lr"]))
    return Scale(lr / (1 - lr * float(group["lambd"]) / 2), float(group["weight_decay"]))


@reads(optim.Adam, optim.AdamW)
def adam(group: Settings, state: Mapping[str, Any], p: Tensor, grad: Tensor) -> Scale:
    """p = (1 - b1^t)(sqrt(v / (1 - b2^t)) + eps), with max v for AMSGrad; F(-1) = (1 - b1)/(1 + b1)."""
    grad, lr, decay, shrink = _decayed(group, p, grad)
    beta1, beta2 = map(float, group["betas"])
    t = float(state.get("step", 0)) + 1
    v = average(state.get("exp_avg_sq"), grad.square(), beta2)
    if group["amsgrad"] and "max_exp_avg_sq" in state:
        v = torch.maximum(v, state["max_exp_avg_sq"])
    denominator = (1 - beta1**t) * ((v / (1 - beta2**t)).sqrt() + group["eps"])
    return Scale(lr * edge_gain(beta1) / (denominator * shrink), decay, second_moment=v)


@reads(optim.RMSprop)
def rmsprop(group: Settings, state: Mapping[str, Any], p: Tensor, grad: Tensor) -> Scale:
    """p = sqrt(v) + eps without bias correction, sqrt(v - mean^2) + eps when centred; F(-1) = 1/(1 + mu)."""
    grad, lr, decay, _ = _decayed(group, p, grad)
    alpha = float(group["alpha"])
    v = average(state.get("square_avg"), grad.square(), alpha)
    spread = v - average(state.get("grad_avg"), grad, alpha).square() if group["centered"] else v
    return Scale(lr / ((1 + float(group["momentum"])) * (spread.sqrt() + group["eps"])), decay, second_moment=v)


@reads(optim.NAdam)
def nadam(group: Settings, state: Mapping[str, Any], p: Tensor, grad: Tensor) -> Scale:
    """p = sqrt(v / (1 - b2^t)) + eps. The direction mixes the gradient and its average with the cached momenta mu:
    F(-1) = (1 - mu_t)/(1 - prod mu) + mu_(t+1)/(1 - mu_(t+1) prod mu) (1 - b1)/(1 + b1)."""
    grad, lr, decay, shrink = _decayed(group, p, grad)
    beta1, beta2 = map(float, group["betas"])
    t = float(state.get("step", 0)) + 1
    mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (k * group["momentum_decay"])) for k in (t, t + 1))
    product = float(state.get("mu_product", 1.0)) * mu
    gain = (1 - mu) / (1 - product) + mu_next / (1 - product * mu_next) * edge_gain(beta1)
    v = average(state.get("exp_avg_sq"), grad.square(), beta2)
    return Scale(lr * gain / (((v / (1 - beta2**t)).sqrt() + group["eps"]) * shrink), decay, second_moment=v)


@reads(optim.RAdam)
def radam(group: Settings, state: Mapping[str, Any], p: Tensor, grad: Tensor) -> Scale:
    """p = (1 - b1^t)(sqrt(v) + eps)/(r_t sqrt(1 - b2^t)) with the rectification r_t, and 1 - b1^t while the variance
    of v is not known (length of the average at most 5); F(-1) as Adam."""
    grad, lr, decay, shrink = _decayed(group, p, grad)
    beta1, beta2 = map(float, group["betas"])
    t = float(state.get("step", 0)) + 1
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / (1 - beta2**t)
    gain = lr * edge_gain(beta1) / ((1 - beta1**t) * shrink)
    if length <= 5:
        return Scale(gain, decay)
    top, bottom = (length - 4) * (length - 2) * longest, (longest - 4) * (longest - 2) * length
    v = average(state.get("exp_avg_sq"), grad.square(), beta2)
    rectified = math.sqrt((1 - beta2**t) * top / bottom)
    return Scale(gain * rectified / (v.sqrt() + group["eps"]), decay, second_moment=v)


@reads(optim.Adamax)
def adamax(group: Settings, state: Mapping[str, Any], p: Tensor, grad: Tensor) -> Scale:
    """p = (1 - b1^t) u with u = max(b2 u, |g| + eps); F(-1) as Adam."""
    grad, lr, decay, _ = _decayed(group, p, grad)
    beta1, beta2 = map(float, group["betas"])
    t = float(state.get("step", 0)) + 1
    u = grad.abs() + group["eps"]
    if "exp_inf" in state:
        u = torch.maximum(u, beta2 * state["exp_inf"])
    return Scale(lr * edge_gain(beta1) / ((1 - beta1**t) * u), decay, second_moment=(u - group["eps"]).clamp(min=0))


@reads(optim.Adagrad)
def adagrad(group: Settings, state: Mapping[str, Any], p: Tensor, grad: Tensor) -> Scale:
    """p = (sqrt(sum g^2) + eps)(1 + (t - 1) lr_decay); F(-1) = 1."""
    grad, lr, decay, _ = _decayed(group, p, grad)
    slowed = 1 + float(state.get("step", 0)) * group["lr_decay"]
    total = state.get("sum", 0) + grad.square()
    return Scale(lr / ((total.sqrt() + group["eps"]) * slowed), decay, second_moment=total)


@reads(optim.Adadelta)
def adadelta(group: Settings, state: Mapping[str, Any], p: Tensor, grad: Tensor) -> Scale:
    """p = sqrt(v + eps)/sqrt(delta + eps), delta the average of squared steps before this one; F(-1) = 1."""
    grad, lr, decay, _ = _decayed(group, p, grad)
    v = average(state.get("square_avg"), grad.square(), float(group["rho"]))
    delta = torch.as_tensor(state.get("acc_delta", 0.0), dtype=p.dtype, device=p.device)
    return Scale(lr * ((delta + group["eps"]) / (v + group["eps"])).sqrt(), decay, second_moment=v)


@reads(optim.Adafactor)
def adafactor(group: Settings, state: Mapping[str, Any], p: Tensor, grad: Tensor) -> Scale:
    """D = alpha / (clip sqrt(v)), alpha = max(eps2, rms(x)) min(lr, t^-1/2), clip = max(1, rms(g / sqrt(v)) / d), v
    factored into rows and columns for matrices; decoupled decay; F(-1) = 1. alpha and clip are held fixed with v."""
    t = float(state.get("step", 0)) + 1
    forget, eps1 = t ** group["beta2_decay"], group["eps"][0]
    eps1 = torch.finfo(p.dtype).eps if eps1 is None else eps1
    square = grad.square()
    if grad.dim() > 1:
        row = average(state.get("row_var"), square.mean(-1, keepdim=True), 1 - forget)
        column = average(state.get("col_var"), square.mean(-2, keepdim=True), 1 - forget)
        v = row @ column / row.mean(-2, keepdim=True).clamp(min=eps1)
    else:
        v = average(state.get("variance"), square, 1 - forget)
    root = v.clamp(min=eps1 * eps1).sqrt()
    lr = float(group["lr"])
    alpha = p.square().mean().sqrt().clamp(min=group["eps"][1]) * min(lr, t**-0.5)
    clip = ((grad / root).square().mean().sqrt() / group["d"]).clamp(min=1.0)
    return Scale(alpha / (clip * root * (1 - lr * float(group["weight_decay"]) / 2)), second_moment=v)


def _decayed(group: Settings, p: Tensor, grad: Tensor) -> tuple[Tensor, float, float, float]:
    """The gradient with coupled decay added, learning rate, coupled decay c, and 1 - omega/2 for decoupled decay."""
    lr, decay = float(group["lr"]), float(group["weight_decay"])
    if group.get("decoupled_weight_decay", False):
        return grad, lr, 0.0, 1 - lr * decay / 2
    return (grad + decay * p if decay else grad), lr, decay, 1.0
