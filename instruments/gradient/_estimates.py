"""What several gradient instruments make of the statistics of single examples.

Shapes: N = examples of the step, L = trained parameter tensors.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from instruments.refusal import Refusal
from instruments.samples.moments import SampleMoments
from instruments.samples.problem import flat_pieces


def require_examples(moments: SampleMoments, examples: int) -> int:
    """The number of examples, or a Refusal where a variance over so few is not defined."""
    if moments.examples < examples:
        raise Refusal(f"expected at least {examples} examples a step for a variance over them, got {moments.examples}.")
    return moments.examples


def trace_of(a: Tensor, q: Tensor, n: int) -> Tensor:
    """S^2 = (A - Q/n) / (n - 1), unbiased for the trace of the covariance of the g_i."""
    return (a - q / n) / (n - 1)


def jackknife(left_out_N: Tensor) -> Tensor:
    """Standard error of an estimate from its N values with one example left out; infinite where one of these is."""
    n = len(left_out_N)
    return torch.where(left_out_N.isinf().any(), torch.inf, left_out_N.std() * ((n - 1) / n**0.5))


class Variances(NamedTuple):
    """By coordinate: gbar^2, the unbiased variance s^2, and 1.0 where that is more than rounding, else 0.0."""

    square_D: Tensor
    variance_D: Tensor
    heard_D: Tensor


def variances(moments: SampleMoments) -> Variances:
    """Rounding leaves a variance of about eps times the mean square where all examples agree, and elements of about eps
    times the largest of the tensor where the gradient is zero by construction (the biases of the keys of attention).
    """
    assert moments.second_D is not None
    n, second_D, rounding = moments.examples, moments.second_D, 8 * torch.finfo(moments.mean_D.dtype).eps
    square_D = moments.mean_D.square()
    variance_D = (second_D - square_D).clamp_(min=0).mul_(n / (n - 1))
    excess_D = torch.sub(variance_D, second_D, alpha=rounding)
    for excess_d, second_d in zip(*(flat_pieces(moments.layout, v_D) for v_D in (excess_D, second_D)), strict=True):
        if len(second_d):
            torch.minimum(excess_d, second_d - rounding**2 * second_d.max(), out=excess_d)
    # Arithmetic in place of masks, which on a CPU take ten times as long; nan_to_num, as the sign of NaN is NaN.
    return Variances(square_D, variance_D, excess_D.clamp_(min=0).sign_().nan_to_num_(0.0))


def lowest_median(values: Tensor, count: Tensor) -> Tensor:
    """The lower median of the `count` values that are neither infinite nor NaN; the tensor is sorted in part.

    On a CPU by numpy's selection, which takes a tenth of the time of a sort.
    """
    middle = (count.long() - 1).clamp_(min=0) // 2
    if values.device.type != "cpu":
        return values.nan_to_num_(torch.inf, torch.inf).sort().values[middle]
    values.numpy().partition(int(middle))
    return values[middle]
