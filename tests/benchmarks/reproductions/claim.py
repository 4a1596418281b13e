"""What a claim of the literature is here, what was measured, and what that says about it."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

INFINITE = math.inf
NONE = "none"


@dataclass(frozen=True)
class Check:
    """One number of a claim, measured once a seed, and the interval that it was expected in.

    `of="each"`: every seed must lie in [low, high]; "mean" and "median": that of the seeds must. NaN lies nowhere.
    Without an interval the number is noted, not judged.
    """

    quantity: str
    setting: str
    values: Sequence[float]
    expected: str
    low: float = -INFINITE
    high: float = INFINITE
    of: Literal["each", "mean", "median"] = "each"

    @property
    def judged(self) -> Sequence[float]:
        if self.of == "each":
            return self.values
        return [statistics.fmean(self.values) if self.of == "mean" else statistics.median(self.values)]

    @property
    def verdict(self) -> str:
        """An empty measurement proves nothing."""
        if self.tolerance == NONE:
            return "noted"
        inside = [self.low <= value <= self.high for value in self.judged]
        return "reproduced" if inside and all(inside) else "missed"

    @property
    def measured(self) -> str:
        """Every seed's value, and the mean or median where that is judged."""
        shown = " ".join(f"{value:.4g}" for value in self.values)
        return shown if self.of == "each" or len(self.values) == 1 else f"{shown} ({self.of} {self.judged[0]:.4g})"

    @property
    def tolerance(self) -> str:
        ends = [f"{bound:.4g}" for bound in (self.low, self.high)]
        if self.low == -INFINITE and self.high == INFINITE:
            return NONE
        if self.low == -INFINITE:
            return f"{self.of} <= {ends[1]}"
        return f"{self.of} >= {ends[0]}" if self.high == INFINITE else f"{self.of} in {ends[0]}..{ends[1]}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinities: these and NaN become text."""
        bounds = {"low": spelt(self.low), "high": spelt(self.high)}
        return asdict(self) | bounds | {"values": [spelt(value) for value in self.values], "verdict": self.verdict}


def spelt(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def near(expected: float, tolerance: float) -> Mapping[str, Any]:
    """The arguments of a Check for expected ± tolerance."""
    return {"expected": f"{expected:.4g}", "low": expected - tolerance, "high": expected + tolerance}


@dataclass(frozen=True)
class Claim:
    """`measure` takes the seeds; `seeds` is how many it is usually given."""

    words: str
    source: str
    measure: Callable[[Sequence[int]], list[Check]]
    seeds: int = 3
