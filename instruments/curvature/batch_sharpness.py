"""Curvature that mini-batches see along their own gradients: what sits at the edge when training is stochastic.

Shapes: D = trainable scalars, K = readings pooled.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, optim

from instruments.curvature._matrix import at_least, price_of
from instruments.instrument import Estimate, Instrument, Output, State, Values
from instruments.parameter_state import ParameterState
from instruments.refusal import Refusal
from instruments.view import Need, View

NAN = float("nan")
SETTINGS = ("lr", "momentum", "dampening", "weight_decay")


@dataclass(frozen=True)
class BatchSharpness(Instrument):
    """E_B[ g_B' H_B g_B / |g_B|^2 ]: gradient and Hessian are those of one mini-batch, the step's own.

    Under SGD it rises and then stays at 2/eta while the sharpness of the whole loss stays below; at full batch it is
    the curvature along the gradient. One batch a reading (`this_batch`); the expectation is over the last `pool`
    readings, so that it belongs to training over that time, and lags by half of it. Two forms: `batch_sharpness` is the
    mean of the ratios, its standard error their scatter over sqrt(K); `ratio_of_means` = sum g'Hg / sum |g|^2, on which
    batches with long gradients weigh more, error by jackknife over the readings. Both errors take the readings as
    independent and training as standing still. After interpolation both collapse: there is no gradient left.

    With momentum mu (torch's SGD) there are two lines: 2 (1 - mu)/eta for small batches, 2 (1 + mu)/eta, the edge of
    gradient descent, for large ones; both are 2/eta at mu = 0, less coupled weight decay. `momentum_form` is
    s'H_B s / (s'g_B) for the direction s = mu b + (1 - dampening) g_B that the step takes, b the buffer before it; its
    edge is 2/eta whatever mu, where the step undoes its own gain. `preconditioned` is g_B' D H_B D g_B / (g_B' D g_B),
    D the optimizer's step size with the learning rate in it (`instruments.preconditioners`): a pure number with the
    edge 2, also for Adam; with D for an alternating gradient, hence the line of large batches.

    Momentum form and lines are NaN, with the reason in the provenance, for other optimizers than torch's SGD and for
    several learning rates, momenta or decays; `preconditioned` for those whose D is not known. A zero gradient is left
    out of all means. A batch whose gradient or curvature is not finite leaves no trace, and all forms are NaN at that
    step. All are of the loss that is given: where accumulated losses are added instead of averaged, k of them, the
    edges are at 1/k of what they say. The masks of dropout are not those of the training step. Comparing batches of
    another size is comparing another expectation.
    """

    pool: int = 20

    outputs: ClassVar[Mapping[str, Output]] = {
        "batch_sharpness": Output("loss / parameter²", "mean of g'Hg / |g|^2 over the last mini-batches, each its own"),
        "ratio_of_means": Output("loss / parameter²", "sum of g'Hg over sum of |g|^2 for the same mini-batches"),
        "this_batch": Output("loss / parameter²", "g'Hg / |g|^2 of this mini-batch; NaN for a zero gradient"),
        "momentum_form": Output("loss / parameter²", "mean of s'Hs / s'g along the step of heavy ball; NaN elsewhere"),
        "preconditioned": Output("1", "mean of g'DHDg / g'Dg, D the optimizer's step size; may be NaN", edge=2.0),
        "low_line": Output("loss / parameter²", "2 (1 - mu)/eta, where small batches level off; NaN beyond SGD"),
        "high_line": Output("loss / parameter²", "2 (1 + mu)/eta, where large batches level off; NaN beyond SGD"),
        "readings": Output("readings", "how many the means are over"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"step_hessian", "preconditioner", "states"})
    reference: ClassVar[str] = (
        "Andreyev and Beneventano 2024, Edge of stochastic stability: revisiting the edge of stability for SGD, "
        "definition 2; both lines under momentum: their sequel of 2026"
    )

    def __post_init__(self) -> None:
        at_least("pool", self.pool, 2)

    def price(self, view: View) -> float:
        return price_of("hessian", 2.5)

    def init(self) -> State:
        return {"sums": []}

    def advance(self, view: View, state: State) -> tuple[Values, State]:
        g_D = view.step_gradient_D
        row = [*_form(view, g_D, g_D), *self._momentum(view, g_D), *self._preconditioned(view, g_D)]
        known = np.isfinite(row[:2]).all()
        rows = [*state["sums"], row][-self.pool :] if known else state["sums"]
        sums = np.array(rows if known else []).reshape(-1, len(row))
        plain = sums[sums[:, 1] > 0, :2]
        low, high = lines(view)
        values: Values = {
            "batch_sharpness": mean_of(sums[:, 0], sums[:, 1]),
            "ratio_of_means": ratio_of_sums(plain),
            "this_batch": row[0] / row[1] if row[1] > 0 else NAN,
            "momentum_form": mean_of(sums[:, 2], sums[:, 3]),
            "preconditioned": mean_of(sums[:, 4], sums[:, 5]),
            "low_line": low,
            "high_line": high,
            "readings": float(len(plain)),
        }
        return values, {"sums": rows}

    def _momentum(self, view: View, g_D: Tensor) -> tuple[float, float]:
        if (reason := not_sgd(view.states)) is not None:
            view.meter.provenance["momentum_form"] = f"unknown: {reason}"
            return NAN, NAN
        return _form(view, direction(view, g_D), g_D)

    def _preconditioned(self, view: View, g_D: Tensor) -> tuple[float, float]:
        try:
            return _form(view, view.preconditioner.times(g_D), g_D)
        except Refusal as refusal:
            view.meter.provenance["preconditioned"] = f"unknown: {refusal}"
            return NAN, NAN


def _form(view: View, d_D: Tensor, g_D: Tensor) -> tuple[float, float]:
    """d'Hd and d'g for the Hessian of the step's batch; products are of unit vectors, whose squares are in range."""
    (d_norm, d_unit_D), (g_norm, g_unit_D) = _unit(d_D), _unit(g_D)
    bent = torch.dot(d_unit_D, view.step_hessian.matvec(d_unit_D)).double()
    along = torch.dot(d_unit_D, g_unit_D).double()
    top, bottom = torch.stack([bent * d_norm.square(), along * d_norm * g_norm]).tolist()
    return top, bottom


def _unit(x_D: Tensor) -> tuple[Tensor, Tensor]:
    """|x| in double precision, and x / |x|; zeros for zeros."""
    norm = torch.linalg.vector_norm(x_D, dtype=torch.float64)
    return norm, torch.where(norm > 0, x_D / norm, torch.zeros_like(x_D))


def not_sgd(states: Sequence[ParameterState]) -> str | None:
    """Why the momentum form is not defined; None where it is."""
    others = {type(s.optimizer).__name__ for s in states if type(s.optimizer) is not optim.SGD}
    if others:
        return f"defined for torch's SGD, not for {', '.join(sorted(others))}"
    settings = {tuple(float(s.group[name]) for name in SETTINGS) for s in states}
    if len(settings) > 1:
        return "the parameter groups have several learning rates, momenta or weight decays"
    if any(s.group["nesterov"] or s.group.get("maximize") for s in states):
        return "defined for heavy ball, not for Nesterov momentum or for maximising"
    return None if states else "no optimizer holds a trained parameter"


def direction(view: View, g_D: Tensor) -> Tensor:
    """s = mu b + (1 - d) g, and g at the first step; without coupled weight decay, zero for what is not trained."""
    held: dict[str, ParameterState] = {s.name: s for s in view.states}
    pieces: list[Tensor | None] = []
    for name, g in zip(view.layout.names, view.layout.split(g_D), strict=True):
        pieces.append(_step_of(held[name].group, held[name].state.get("momentum_buffer"), g) if name in held else None)
    return view.layout.join(pieces)


def _step_of(group: Mapping[str, Any], buffer: Tensor | None, g: Tensor) -> Tensor:
    if not group["momentum"] or buffer is None:
        return g
    return buffer * float(group["momentum"]) + g * (1 - float(group["dampening"]))


def lines(view: View) -> tuple[float, float]:
    """2/(eta F(1)) and 2/(eta F(-1)) of heavy ball, F the gain of its momentum; NaN where they are not defined."""
    states = view.states
    if not_sgd(states) is not None:
        return NAN, NAN
    lr, mu, dampening, decay = (float(states[0].group[name]) for name in SETTINGS)
    rate = lr * (1 - dampening) if mu else lr
    if rate == 0:
        return math.inf, math.inf
    low, high = (2 * (1 + sign * mu) / rate - decay for sign in (-1, 1))
    return low, high


def mean_of(tops_K: np.ndarray[Any, Any], bottoms_K: np.ndarray[Any, Any]) -> Estimate:
    """Mean of the ratios of what is finite with a positive denominator, and its standard error."""
    usable = np.isfinite(tops_K) & np.isfinite(bottoms_K) & (bottoms_K > 0)
    ratios = tops_K[usable] / bottoms_K[usable]
    k = len(ratios)
    if k == 0:
        return Estimate(NAN, NAN)
    return Estimate(float(ratios.mean()), float(ratios.std(ddof=1)) / math.sqrt(k) if k > 1 else NAN)


def ratio_of_sums(sums_K2: np.ndarray[Any, Any]) -> Estimate:
    """sum of the first column over sum of the second, with its jackknife standard error over the rows."""
    k = len(sums_K2)
    if k == 0:
        return Estimate(NAN, NAN)
    total = sums_K2.sum(0)
    value = float(total[0] / total[1])
    if k == 1:
        return Estimate(value, NAN)
    left_out = total - sums_K2
    if (left_out[:, 1] <= 0).any():  # one reading is so large that the others are rounding beside it
        return Estimate(value, math.inf)
    ratios = left_out[:, 0] / left_out[:, 1]
    return Estimate(value, math.sqrt((k - 1) / k * float(np.square(ratios - ratios.mean()).sum())))
