"""What a training run is to reach: one metric, one number, one direction.

A target knows no framework: it compares numbers, so that run logs can be read and scored without torch.

    >>> goal = at_least("valid_accuracy", 0.97)
    >>> print(goal)
    valid_accuracy >= 0.97
    >>> goal.reached(0.971), goal.reached(float("nan"))
    (True, False)
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

Direction = Literal["at_least", "at_most"]


@dataclass(frozen=True)
class Target:
    """The metric named `metric` is to come to `value` or past it, upwards (`at_least`) or downwards (`at_most`).

    `value` has the unit of the metric. Raises ValueError for an empty name, a direction of another name, or a value
    that is not finite: such a target would be reached always or never, and time to target would mean nothing.
    """

    metric: str
    value: float
    direction: Direction

    def __post_init__(self) -> None:
        if not self.metric:
            raise ValueError("expected the name of a metric, got an empty string; name it as evaluate returns it")
        if self.direction not in get_args(Direction):
            raise ValueError(
                f"expected the direction 'at_least' or 'at_most', got {self.direction!r}; "
                "use at_least(metric, value) or at_most(metric, value)"
            )
        if not math.isfinite(self.value):
            raise ValueError(
                f"expected a finite target for {self.metric}, got {self.value!r}; give a number: "
                "an infinite or undefined target makes every run a hit or every run a miss"
            )

    def reached(self, value: float) -> bool:
        """Whether a measured value hits the target; equality is a hit, NaN is not."""
        return value >= self.value if self.direction == "at_least" else value <= self.value

    def better(self, a: float, b: float) -> bool:
        """Whether `a` is strictly better than `b`. NaN is worse than every number, so a best-so-far may start there."""
        if math.isnan(a) or math.isnan(b):
            return math.isnan(b) and not math.isnan(a)
        return a > b if self.direction == "at_least" else a < b

    def __str__(self) -> str:
        return f"{self.metric} {'>=' if self.direction == 'at_least' else '<='} {self.value:g}"


def at_least(metric: str, value: float) -> Target:
    """Target of a metric that should grow, such as an accuracy."""
    return Target(metric, value, "at_least")


def at_most(metric: str, value: float) -> Target:
    """Target of a metric that should shrink, such as a loss."""
    return Target(metric, value, "at_most")
