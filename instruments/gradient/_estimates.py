"""What several gradient instruments make of the statistics of single examples.

Shapes: N = examples of the step, L = trained parameter tensors, S = sampled elements.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from instruments.refusal import Refusal
from instruments.samples.moments import SampleMoments

Array = npt.NDArray[np.float64]

SAMPLED = 1024  # elements that say where the median is
WIDTH = 3.0  # standard deviations of the rank of a sampled quantile, to either side


def require_examples(moments: SampleMoments, examples: int) -> int:
    """The number of examples, or a Refusal where a variance over so few is not defined."""
    if moments.examples < examples:
        raise Refusal(f"expected at least {examples} examples a step for a variance over them, got {moments.examples}.")
    return moments.examples


def trace_of(a: Any, q: Any, n: int) -> Any:
    """S^2 = (A - Q/n) / (n - 1), unbiased for the trace of the covariance of the g_i."""
    return (a - q / n) / (n - 1)


def jackknife(left_out_N: Array) -> float:
    """Standard error of an estimate from its N values with one example left out; infinite where one of these is, NaN
    for a single example."""
    n = len(left_out_N)
    if n < 2:
        return math.nan
    if np.isinf(left_out_N).any():
        return math.inf
    deviation_N = left_out_N - left_out_N.sum() / n
    return math.sqrt(float(deviation_N @ deviation_N) * (n - 1) / n)


class Shares(NamedTuple):
    """gbar^2 / E g^2 by coordinate, (D,): x/(1 + x) of the ratio x of the squared mean to the variance over N (not
    N - 1) examples, so it orders the coordinates as x does. Those whose variance is rounding are at `most` or above it,
    infinite or NaN; `heard` are below. `silent` is the share of the others, NaN where a gradient is not finite."""

    share_D: Tensor
    most: float
    heard: int
    silent: float


def shares(moments: SampleMoments) -> Shares:
    """Rounding leaves a variance of about eps times the mean square where all examples agree, and elements of about eps
    times the largest of the tensor where the gradient is zero by construction (the biases of the keys of attention).
    """
    assert moments.second is not None
    rounding = 8 * torch.finfo(moments.layout.dtype).eps
    pairs = [pair for pair in zip(moments.mean, moments.second, strict=True) if len(pair[0])]
    mean, second = [m for m, _ in pairs], [s for _, s in pairs]
    floors = torch.stack(torch._foreach_max(second)).mul_(rounding**2).tolist()
    above = [F.threshold(s, floor, 0.0) for s, floor in zip(second, floors, strict=True)]
    share_D = torch.cat(torch._foreach_div(torch._foreach_mul(mean, mean), above))
    n = moments.examples
    most = 1 - rounding * (n - 1) / n
    heard = int(np.count_nonzero((share_D < most).cpu().numpy()))
    silent = 1 - heard / moments.layout.size if all(map(math.isfinite, floors)) else math.nan
    return Shares(share_D, most, heard, silent)


def lowest_median(values: Tensor, count: int) -> float:
    """The lower median of the `count` lowest values, of which none is infinite or NaN; the tensor may be rearranged.

    On a CPU by a bracket round it, from two values of a sample: what lies within is a few per cent of all, and
    is selected from. That takes a fifth of the time of a selection from all, and is as exact.
    """
    rank = max(count - 1, 0) // 2
    if values.device.type != "cpu":
        return float(values.nan_to_num_(torch.inf, torch.inf).sort().values[rank])
    array = values.numpy()
    inside, below = _bracket(array, rank / max(count, 1))
    if not below <= rank < below + len(inside):
        inside, below = array, 0
    inside.partition(rank - below)
    return float(inside[rank - below])


def _bracket(array: npt.NDArray[Any], quantile: float) -> tuple[npt.NDArray[Any], int]:
    """The values between two of a sample that are likely to have that quantile between them, and how many are below."""
    sample_S = array[:: max(1, len(array) // SAMPLED)]
    sample_S = sample_S[np.isfinite(sample_S)]
    last = len(sample_S) - 1
    if last < 0:
        return array[:0], 0
    middle, reach = quantile * last, WIDTH * math.sqrt(last * quantile * (1 - quantile)) + 1
    low_rank, high_rank = max(0, math.floor(middle - reach)), min(last, math.ceil(middle + reach))
    sample_S.partition((low_rank, high_rank))
    low, high = sample_S[low_rank], sample_S[high_rank]
    return array[(array >= low) & (array <= high)], int(np.count_nonzero(array < low))
