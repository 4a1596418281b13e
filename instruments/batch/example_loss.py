"""How the loss is spread over the examples of the step's batch.

Shapes: N = examples of the step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from instruments.instrument import Estimate, Gauge, Output, Values
from instruments.view import Need, View

LEVELS = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class ExampleLoss(Gauge):
    """Mean, spread and extremes of the losses of the N examples of the batch, whose mean is the loss of the step.

    The standard error of the mean is the deviation over sqrt(N): how much of a change of the loss from step to step is
    the choice of the batch. A `largest_share` far above 1/N names a batch that one example dominates (a wrong label, a
    broken record). Examples whose loss is not finite are counted; the other outputs are over the finite ones.
    """

    outputs: ClassVar[Mapping[str, Output]] = {
        "mean": Output("loss", "mean over the examples, with the standard error of a random batch"),
        "deviation": Output("loss", "standard deviation over the examples"),
        "low": Output("loss", "5 % quantile"),
        "median": Output("loss", "median"),
        "high": Output("loss", "95 % quantile"),
        "largest": Output("loss", "largest loss of one example"),
        "largest_share": Output("1", "share of that example in the sum of the absolute losses"),
        "not_finite": Output("examples", "examples whose loss is NaN or infinite"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"example_losses"})
    reference: ClassVar[str] = "Katharopoulos and Fleuret 2018, Not all samples are created equal, for the largest ones"

    def price(self, view: View) -> float:
        return 1 / 3

    def read(self, view: View) -> Values:
        losses_N = view.losses_N.double()
        finite = losses_N[losses_N.isfinite()]
        broken = float(len(losses_N) - len(finite))
        if len(finite) == 0:
            nan = float("nan")
            return {name: broken if name == "not_finite" else nan for name in self.outputs}
        quantiles = torch.quantile(finite, torch.tensor(LEVELS, dtype=finite.dtype, device=finite.device))
        deviation = finite.std() if len(finite) > 1 else finite.new_tensor(float("nan"))
        return {
            "mean": Estimate(finite.mean(), deviation / len(finite) ** 0.5),
            "deviation": deviation,
            "low": quantiles[0],
            "median": quantiles[1],
            "high": quantiles[2],
            "largest": finite.max(),
            "largest_share": finite.abs().max() / finite.abs().sum(),
            "not_finite": broken,
        }
