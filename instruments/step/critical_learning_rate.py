"""How much longer the step could have been before it raised the loss: a search along its line by forwards alone."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from instruments.after_step import Groups
from instruments.instrument import Gauge, Output, Values
from instruments.view import Need, View


@dataclass(frozen=True)
class CriticalLearningRate(Gauge):
    """Best and critical length of the step u just taken, as multiples m of it, on its own batch.

    The loss f(m) = L(theta + m u) is read at growing multipliers until it stands above f(0). That brackets the critical
    multiplier m_c, where the step has just undone its own gain: f(m_c) = f(0). The bracket is halved `refinements`
    times (in the logarithm), and m_c found within it by taking the chord (f(m) - f(0)) / m as linear in m, which is
    exact for a parabola. `best` is the lowest point of the parabola through the lowest loss read and its neighbours.
    For a parabola m_c = 2 best = 1 / r (`step/step_ratio`), and m_c < 1 means that this step raised the loss.

    The learning rates are m times those of the groups. For SGD without momentum that is what a changed learning rate
    would have done to this step; with momentum or Adam the line is that of the step taken, and what a changed learning
    rate does over many steps is another question (`curvature/preconditioned_sharpness`). The loss is that of one
    mini-batch, on which longer steps look better than on others. A loss that rises and falls again along the line is
    read up to the first rise on the ladder. What is not finite counts as above. A loss that is not finite at the start,
    or the same at every multiple (a step of length zero, as a warm-up may begin with; a model without gradient), makes
    every value NaN.
    """

    multipliers: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    refinements: int = 2

    outputs: ClassVar[Mapping[str, Output]] = {
        "critical": Output("1", "multiple of the step at which the loss is back where it began", edge=1.0),
        "best": Output("1", "multiple of the step at which the loss is lowest"),
        "low": Output("1", "longest multiple read below the first rise: the critical one is no shorter"),
        "high": Output("1", "shortest multiple read that raises the loss: the critical one is no longer"),
        "critical_learning_rate": Output("as the learning rate", "critical times that of each group", "per-group"),
        "best_learning_rate": Output("as the learning rate", "best times that of each group", "per-group"),
        "still_falling": Output("1", "1 where even the longest multiple does not raise the loss: critical is a bound"),
        "rises_at_once": Output("1", "1 where every multiple read raises the loss (a step uphill): critical is 0"),
        "forwards": Output("1", "losses that were read"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"line", "groups"})
    reference: ClassVar[str] = (
        "Kalra and Barkeshli 2024, Why warmup the learning rate?, algorithms 1 and 2; "
        "Roulet et al. 2024, Stepping on the edge"
    )

    def __post_init__(self) -> None:
        ladder = self.multipliers
        if not ladder or list(ladder) != sorted(set(ladder)) or ladder[0] <= 0:
            raise ValueError(
                f"expected positive multipliers that increase, got {ladder}; with others the search could not stop."
            )
        if self.refinements < 0:
            raise ValueError(f"expected refinements of at least 0, got {self.refinements}.")

    def price(self, view: View) -> float:
        return (1 + len(self.multipliers) + self.refinements) / 3

    def read(self, view: View) -> Values:
        groups = Groups.of(view)
        line = Line(lambda m: float(view.loss_at(m)), max(torch.finfo(p.dtype).eps for p in view.layout.params))
        line.climb(self.multipliers)
        line.halve(self.refinements)
        known = math.isfinite(line.losses[0.0]) and len(set(line.losses.values())) > 1
        critical, best = (line.critical(), line.best()) if known else (math.nan, math.nan)
        rates_G = groups.rates(torch.empty(0, dtype=torch.float64))
        return {
            "critical": critical,
            "best": best,
            "low": line.low if known else math.nan,
            "high": line.high if known else math.nan,
            "critical_learning_rate": critical * rates_G,
            "best_learning_rate": best * rates_G,
            "still_falling": float(line.high == math.inf) if known else math.nan,
            "rises_at_once": float(line.low == 0 < line.high < math.inf) if known else math.nan,
            "forwards": float(len(line.losses)),
        }


@dataclass
class Line:
    """Losses read so far by multiplier, and the bracket (low, high) of the first rise above the loss at 0."""

    loss_at: Callable[[float], float]
    eps: float
    losses: dict[float, float] = field(default_factory=dict)
    low: float = 0.0
    high: float = math.inf

    def climb(self, multipliers: tuple[float, ...]) -> None:
        self.losses[0.0] = self.loss_at(0.0)
        for m in multipliers:
            if self.high == math.inf and math.isfinite(self.losses[0.0]):
                self._look(m)

    def halve(self, times: int) -> None:
        """Below the first multiplier there is no logarithm to halve: it is divided by ten."""
        for _ in range(times if self.high < math.inf else 0):
            self._look(math.sqrt(self.low * self.high) if self.low > 0 else self.high / 10)

    def _look(self, m: float) -> None:
        self.losses[m] = self.loss_at(m)
        if self._gain(m) <= 4 * self.eps * abs(self.losses[0.0]):
            self.low = m
        else:
            self.high = m

    def _gain(self, m: float) -> float:
        return self.losses[m] - self.losses[0.0]

    def critical(self) -> float:
        """Where the loss is back at its start; `low` where the loss at `high` is not finite or not known."""
        if self.low == 0 or self.high == math.inf or not math.isfinite(self.losses[self.high]):
            return self.low
        falling, rising = min(self._gain(self.low), 0.0) / self.low, self._gain(self.high) / self.high
        return self.low + (self.high - self.low) * -falling / (rising - falling)

    def best(self) -> float:
        """The lowest point of the parabola through the lowest loss and its neighbours."""
        points = sorted((m, loss) for m, loss in self.losses.items() if math.isfinite(loss))
        i = min(range(len(points)), key=lambda j: points[j][1])
        if i in (0, len(points) - 1):
            return points[i][0]
        (x0, y0), (x1, y1), (x2, y2) = points[i - 1 : i + 2]
        left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
        if right == left:
            return x1
        return (x0 + x1) / 2 - left * (x2 - x0) / (2 * (right - left))
