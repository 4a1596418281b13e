"""What several gradient instruments make of the statistics of single examples.

Shapes: N = examples of the step, L = trained parameter tensors.
"""

from collections.abc import Iterator

import numpy as np
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
    variance = (n - 1) / n * (left_out_N - left_out_N.mean()).square().sum()
    return torch.where(left_out_N.isinf().any(), torch.inf, variance.sqrt())


def variances(moments: SampleMoments) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """By parameter tensor, flat: gbar^2, the unbiased variance s^2, and which coordinates have some beyond rounding.

    Rounding leaves a variance of about eps times the mean square where all examples agree, and elements of about eps
    times the largest of the tensor where the gradient is zero by construction (the biases of the keys of attention).
    """
    assert moments.second_D is not None
    n, rounding = moments.examples, 8 * torch.finfo(moments.mean_D.dtype).eps
    pieces = (flat_pieces(moments.layout, v_D) for v_D in (moments.mean_D, moments.second_D))
    for mean_d, second_d in zip(*pieces, strict=True):
        square_d = mean_d.square()
        variance_d = (second_d - square_d).clamp_(min=0).mul_(n / (n - 1))
        heard_d = (variance_d > rounding * second_d) & (second_d > rounding**2 * second_d.max())
        yield square_d, variance_d, heard_d


def median(values: Tensor) -> Tensor:
    """The lower median; on a CPU by numpy's selection, which takes a tenth of the time of a sort."""
    if values.device.type != "cpu" or bool(values.isnan().any()):
        return values.median()
    middle = (len(values) - 1) // 2
    return torch.as_tensor(np.partition(values.numpy(), middle)[middle])
