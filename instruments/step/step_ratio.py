"""Did the step stop short of the minimum along its own line, hit it, or jump across?"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from instruments.instrument import Estimate, Gauge, Output, Values
from instruments.view import Need, View


@dataclass(frozen=True)
class StepRatio(Gauge):
    """r and alpha of the step u that the optimizer took, whatever the optimizer, on the batch that it was taken on.

    Along the step the loss is f(0) + t g'u + 1/2 t^2 u'Hu + ...; with the measured change df = f(1) - f(0),

        r = 1/2 u'Hu / (-g'u) = (df - g'u) / (-g'u),        alpha = 2 r - 1.

    r = 1 undoes all progress (the step's own edge); alpha is -1 for an infinitesimal step, 0 at the minimum of the
    parabola, 1 at the mirror point. Negative r (alpha below -1) means negative curvature along the step. Both ends use
    the same batch, masks and mode: with two different batches the norm test would be added to alpha. A step uphill
    (g'u >= 0, as momentum sometimes takes) has no such parabola: r is NaN and `slope` says so. The error is the
    rounding of the two losses.
    """

    outputs: ClassVar[Mapping[str, Output]] = {
        "r": Output("1", "share of the first-order gain that curvature takes back", edge=1.0),
        "alpha": Output("1", "where the step landed on its parabola: -1 no move, 0 minimum, 1 mirrored", edge=0.0),
        "slope": Output("loss", "g'u, change of the loss predicted to first order"),
        "change": Output("loss", "measured change of the loss on the same batch"),
        "update_norm": Output("parameter", "|u|, length of the step"),
        "cosine": Output(
            "1", "c = -g'u / (|g| |u|), g recomputed: 1 for SGD, about 0 where gradients are not zeroed", edge=0.0
        ),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"update"})
    reference: ClassVar[str] = (
        "alpha: Schneider, Dangel and Hennig 2021, Cockpit, section 3.2; r: Roulet et al. 2024, Stepping on the edge"
    )

    def price(self, view: View) -> float:
        return view.sample_pass + 1 / 3

    def read(self, view: View) -> Values:
        e = view.effect
        change = e.loss_after - e.loss_before
        r = (change - e.slope) / -e.slope if e.slope < 0 else float("nan")
        error = e.rounding / -e.slope if e.slope < 0 else float("nan")
        return {
            "r": Estimate(r, error),
            "alpha": Estimate(2 * r - 1, 2 * error),
            "slope": e.slope,
            "change": change,
            "update_norm": e.update_norm,
            "cosine": -e.slope / product if (product := e.gradient_norm * e.update_norm) else float("nan"),
        }
