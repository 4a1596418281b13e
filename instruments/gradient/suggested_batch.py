"""Batch size that the learning rate asks for (CABS).

Shapes: N = examples of the step, L = trained parameter tensors, P = parameter groups.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import optim

from instruments.gradient._estimates import jackknife, require_examples, trace_of
from instruments.instrument import Estimate, Gauge, Output, Values
from instruments.refusal import Refusal
from instruments.view import Need, View


@dataclass(frozen=True)
class SuggestedBatch(Gauge):
    """B* = sum over groups of eta_p tr(Sigma_p) / (L - minimum): the batch at which noise and descent balance.

    The rule maximises a lower bound on the expected gain of one step per example, under three assumptions: plain SGD,
    the same curvature 1/eta in every direction, and a loss whose least value is `minimum`, 0 unless set (with smoothed
    labels it is their entropy). Where they hold, |G|^2 = 2 (L - minimum)/eta and B* is twice the noise scale. It says
    how much noise *this* learning rate can bear: a smaller eta asks for a smaller batch. As the loss nears its minimum
    B* grows like the inverse of the distance, so late in training it is only as good as `minimum`.

    tr(Sigma) is the unbiased trace of the covariance of the g_i, L the mean loss of the same N examples; the standard
    error is the jackknife of the whole expression over them. SGD with momentum mu and dampening d goes, in the long
    run, eta (1 - d)/(1 - mu) a step along a slowly turning gradient; that effective rate takes the place of eta, and
    the provenance says so. It is right where the gradient changes little within 1/(1 - mu) steps. Weight decay adds no
    noise and is left out. Every other optimizer is refused: its step is not proportional to the gradient, and a
    rescaled variance sum eta_j sigma_j^2 with eta_j ~ 1/sqrt(v_j) would put the noise into its own measure, since v
    holds it.
    """

    minimum: float = 0.0

    outputs: ClassVar[Mapping[str, Output]] = {
        "suggested_batch": Output("examples", "eta tr(Sigma) / (loss - minimum)"),
        "effective_rate": Output(
            "parameter² / loss", "learning rate of each group as used, corrected for momentum", "per-group"
        ),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"samples", "inner_products", "example_losses", "states", "groups"})
    reference: ClassVar[str] = "Balles, Romero and Hennig 2017, Coupling adaptive batch sizes with learning rates"

    def price(self, view: View) -> float:
        return view.sample_pass + 1.0

    def read(self, view: View) -> Values:
        groups = [(optimizer, group) for optimizer in view.optimizers for group in optimizer.param_groups]
        rates_P = [effective_rate(optimizer, group) for optimizer, group in groups]
        moments = view.moments
        n = require_examples(moments, 2)
        rate_of = {state.name: rates_P[state.group_number] for state in view.states}
        if not rate_of:
            raise Refusal("no optimizer of this run holds a trained parameter, so there is no learning rate.")
        rate_L = np.array([rate_of.get(name, 0.0) for name in moments.layout.names])
        losses_N = view.losses_N.double().cpu().numpy() - self.minimum
        total = losses_N.sum()
        if total <= 0:
            raise Refusal(
                f"expected a loss above its minimum of {self.minimum:g}, got {float(total) / n + self.minimum:g}; "
                "pass the least value that the loss can take as `minimum`."
            )

        def suggested(a: Any, q: Any, loss: Any, count: int) -> Any:
            return (rate_L * trace_of(a, q, count)).sum(-1) / loss

        value, error = suggested(moments.sum_of_squares_L, moments.square_of_sum_L, total / n, n), np.nan
        if n > 2:
            with np.errstate(divide="ignore", invalid="ignore"):
                error = jackknife(suggested(*moments.left_out_sums, (total - losses_N) / (n - 1), n - 1))
        momentum = any(group["momentum"] for _, group in groups)
        view.meter.provenance["step_size"] = "lr (1 - dampening) / (1 - momentum)" if momentum else "lr"
        rates = np.array(rates_P, dtype=float)
        return {"suggested_batch": Estimate(float(value), error), "effective_rate": rates}


def effective_rate(optimizer: optim.Optimizer, group: Mapping[str, Any]) -> float:
    """eta (1 - d) / (1 - mu), eta itself without momentum; a Refusal for anything but SGD that minimises."""
    name = type(optimizer).__name__
    plain = isinstance(optimizer, optim.SGD)
    if not plain or inspect.unwrap(type(optimizer).step) is not inspect.unwrap(optim.SGD.step):
        raise Refusal(
            f"expected torch's SGD, got {name}: its step is not a learning rate times a gradient, so the rule says "
            "nothing about it. Read gradient/noise_scale, which assumes no optimizer."
        )
    if group["maximize"]:
        raise Refusal("the optimizer maximizes its objective; the rule is about descent to a least value.")
    rate, momentum = float(group["lr"]), float(group["momentum"])
    if momentum >= 1:
        raise Refusal(f"momentum {momentum:g} adds up all gradients without end: no effective learning rate exists.")
    return rate * (1 - float(group["dampening"])) / (1 - momentum) if momentum else rate
