"""Evidence-based early stopping: is there anything but noise left in the gradient of the training loss?

Shapes: N = examples of the step, D = coordinates with variance, K = readings pooled.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from instruments.gradient._estimates import require_examples, shares
from instruments.instrument import Estimate, Instrument, Output, State, Values
from instruments.samples.moments import SampleMoments
from instruments.view import Need, View

NAN = float("nan")


@dataclass(frozen=True)
class EarlyStopping(Instrument):
    """1 - (N/D) sum_j gbar_j^2 / s_j^2: above 0, the gradient is smaller than the noise alone would make it.

    gbar_j is the mean of coordinate j over the N examples and s_j^2 its unbiased variance, so N gbar_j^2 / s_j^2 is 1
    in expectation where the full gradient is zero and s_j^2 is exact. Stop training when the criterion stays above 0:
    what is followed from there on is the sample. It looks at the gradient and not at the step, so any optimizer will
    do.

    Coordinates without variance (units dead for the whole batch, or all rounding) are left out and counted; nothing is
    added to a denominator. The variance of a small batch is itself noisy: N gbar^2/s^2 of Gaussian noise has mean
    (N - 1)/(N - 3), so the criterion stands at -2/(N - 3) where it should be 0 and a small batch never stops.
    `corrected` multiplies the sum by (N - 3)/(N - 1); below four examples that mean does not exist and the reading is
    refused. Both are means over the last `pool` readings with their standard error, unknown (NaN) at the first, since
    the coordinates of one batch are far from independent; `of_batch` is the criterion of this batch alone. Where a
    gradient is not finite all values are NaN, and later readings pool what came before.
    """

    pool: int = 20

    outputs: ClassVar[Mapping[str, Output]] = {
        "criterion": Output("1", "1 - (N/D) sum gbar_j^2 / s_j^2, pooled; stop when it stays above 0", edge=0.0),
        "corrected": Output("1", "the same without the bias of the variance of a small batch, pooled", edge=0.0),
        "of_batch": Output("1", "the criterion of this batch alone", edge=0.0),
        "silent": Output("1", "share of coordinates without variance in this batch, left out"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"samples", "second_moment"})
    reference: ClassVar[str] = "Mahsereci, Balles, Lassner and Hennig 2017, Early stopping without a validation set"

    def price(self, view: View) -> float:
        return view.sample_pass + 2 / 3

    def init(self) -> State:
        return {"readings": []}

    def advance(self, view: View, state: State) -> tuple[Values, State]:
        moments = view.moments
        n = require_examples(moments, 4)
        total, heard, silent = signal_over_noise(moments)
        known = not math.isnan(silent)
        mean = n * total / heard if heard and known else NAN
        reading = (1 - mean, 1 - (n - 3) / (n - 1) * mean)
        readings = [*state["readings"], reading][-self.pool :] if math.isfinite(mean) else state["readings"]
        criterion, corrected = pooled_means(readings if known else [])
        values: Values = {"criterion": criterion, "corrected": corrected, "of_batch": 1 - mean, "silent": silent}
        return values, {"readings": readings}


def signal_over_noise(moments: SampleMoments) -> tuple[float, int, float]:
    """Sum of gbar_j^2 / s_j^2 over the coordinates whose variance is more than rounding, their number, and the share of
    the others, NaN where a gradient is not finite."""
    share_D, most, heard, silent = shares(moments)
    share_D = torch.where(share_D < most, share_D, 0.0).double()
    n = moments.examples
    return float((share_D / (1 - share_D)).sum()) * (n - 1) / n, heard, silent


def pooled_means(readings_K2: Sequence[tuple[float, float]]) -> tuple[Estimate, Estimate]:
    """Mean of both columns with its standard error."""
    if not readings_K2:
        return Estimate(NAN, NAN), Estimate(NAN, NAN)
    rows = np.array(readings_K2, dtype=float)
    errors = rows.std(0, ddof=1) / len(rows) ** 0.5 if len(rows) > 1 else np.full(2, np.nan)
    first, second = (Estimate(float(mean), float(error)) for mean, error in zip(rows.mean(0), errors, strict=True))
    return first, second
