"""How often the gradient is clipped, and by how much."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from instruments.after_step import used_gradients
from instruments.instrument import Estimate, Instrument, Output, State, Values
from instruments.layout import norms_of
from instruments.view import Need, View

TOLERANCE = 1e-3  # as of the cockpit's event of a clip


@dataclass(frozen=True)
class Clipping(Instrument):
    """The norm of the gradient at observe against its norm when the optimizer's step was taken.

    A step counts as clipped when the second is shorter by more than one part in a thousand, whatever made it so:
    clipping by norm or by value, in place. `factor` is what was left, and the learning rate of plain SGD was multiplied
    by it at that step. (Adam hardly notices a factor that is always the same.) `share` and `typical` pool the last
    `pool` readings: a share near 1 means that the threshold sets the length of every gradient, and one that
    climbs late in training that gradients grow. The error of the share takes the readings as independent; clips come in
    runs, so it is rather larger.

    Both norms are without the scale of a GradScaler, whether `unscale_` is called before observe(), between it and the
    clip, or by `scaler.step`. Clipping before observe() cannot be seen here: observe() belongs between backward() and
    the clip. SGD with Nesterov momentum over lists of tensors, which writes to `.grad`, is refused.
    """

    pool: int = 100

    outputs: ClassVar[Mapping[str, Output]] = {
        "clipped": Output("1", "1 where the gradient of this step was clipped, else 0"),
        "factor": Output("1", "norm after over norm before, 1 where nothing was clipped"),
        "before": Output("loss / parameter", "norm of the gradient at observe"),
        "after": Output("loss / parameter", "norm of the gradient that the optimizer used"),
        "share": Output("1", "share of clipped steps among the readings pooled"),
        "typical": Output("1", "median factor of the clipped steps among them; NaN where there is none"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"gradient", "change", "groups"})
    reference: ClassVar[str] = "Pascanu, Mikolov and Bengio 2013, On the difficulty of training recurrent networks, 3.2"

    def __post_init__(self) -> None:
        if self.pool < 1:
            raise ValueError(f"expected a pool of at least 1 reading, got {self.pool}.")

    def price(self, view: View) -> float:
        return 0.05

    def init(self) -> State:
        return {"factors": []}

    def advance(self, view: View, state: State) -> tuple[Values, State]:
        at_observe = view.gradient_norm
        used = torch.linalg.vector_norm(norms_of(used_gradients(view)))
        before, after = torch.stack([at_observe, used.to(at_observe)]).tolist()
        factor = 1.0 if after >= before * (1 - TOLERANCE) else after / before
        known = bool(np.isfinite([before, after]).all())
        factors = [*state["factors"], factor][-self.pool :] if known else state["factors"]
        cut = [f for f in factors if f < 1]
        share = len(cut) / len(factors) if factors else float("nan")
        values: Values = {
            "clipped": float(factor < 1) if known else float("nan"),
            "factor": factor if known else float("nan"),
            "before": before,
            "after": after,
            "share": Estimate(share, (share * (1 - share) / len(factors)) ** 0.5 if factors else float("nan")),
            "typical": float(np.median(cut)) if cut else float("nan"),
        }
        return values, {"factors": factors}
