"""What several gradient instruments make of the statistics of single examples.

Shapes: N = examples of the step, L = trained parameter tensors, S = sampled elements.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from instruments.refusal import Refusal
from instruments.samples.moments import SampleMoments
from instruments.samples.problem import flat_pieces

Array = npt.NDArray[np.float64]

SAMPLED = 2048  # elements that say where the median is
WIDTH = 4.0  # standard deviations of the rank of a sampled quantile, to either side


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


class Variances(NamedTuple):
    """By coordinate: gbar^2, the variance over N (not N - 1) examples, and whether that is more than rounding."""

    square_D: Tensor
    variance_D: Tensor
    heard_D: Tensor


def variances(moments: SampleMoments) -> Variances:
    """Rounding leaves a variance of about eps times the mean square where all examples agree, and elements of about eps
    times the largest of the tensor where the gradient is zero by construction (the biases of the keys of attention).
    """
    assert moments.second_D is not None
    n, second_D, mean_D = moments.examples, moments.second_D, moments.mean_D
    rounding = 8 * torch.finfo(mean_D.dtype).eps
    variance_D = torch.addcmul(second_D, mean_D, mean_D, value=-1).clamp_(min=0)
    excess_D = torch.sub(variance_D, second_D, alpha=rounding * (n - 1) / n)
    excess, second = ([v_d for v_d in flat_pieces(moments.layout, v_D) if len(v_d)] for v_D in (excess_D, second_D))
    floors = torch._foreach_mul(torch._foreach_max(second), rounding**2)
    torch._foreach_minimum_(excess, torch._foreach_sub(second, floors))
    return Variances(mean_D.square(), variance_D, excess_D > 0)  # NaN is not heard


def lowest_median(values: Tensor, count: int) -> float:
    """The lower median of the `count` values that are neither infinite nor NaN; the tensor may be rearranged.

    On a CPU by a bracket round it, from the sorted values of a sample: what lies within is a few per cent of all, and
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
    sample_S = np.sort(sample_S[np.isfinite(sample_S)])
    if not len(sample_S):
        return array[:0], 0
    middle, reach = quantile * len(sample_S), WIDTH * math.sqrt(len(sample_S) * quantile * (1 - quantile)) + 1
    low = sample_S[max(0, math.floor(middle - reach))]
    high = sample_S[min(len(sample_S) - 1, math.ceil(middle + reach))]
    return np.compress((array >= low) & (array <= high), array), int(np.count_nonzero(array < low))
