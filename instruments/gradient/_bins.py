"""Symmetric logarithmic bins, and a bounded sample of the elements of many tensors.

Shapes: S = sampled elements, K = bins.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from instruments.gradient._tensors import dense
from instruments.refusal import Refusal

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

INNER, OUTER = 0.01, 0.99  # quantiles of the sizes between which adaptive bins lie
NOTHING = (-20.0, 0.0)  # powers of two that the bins of nothing but zeros span


def strided_sample(tensors: Sequence[Tensor], limit: int) -> Tensor:
    """About `limit` of the elements, (S,) in float64: every s-th of each tensor, and at least one of each.

    No random number is drawn. s has no divisor in common with the size of the tensor, so that the sample walks through
    every row, column and channel instead of staying in one of them. Tensors of equal shapes are sampled at the same
    places. Raises Refusal for complex tensors.
    """
    if any(t.is_complex() for t in tensors):
        raise Refusal("complex numbers have no order, so they have no histogram.")
    wanted = math.ceil(sum(t.numel() for t in tensors) / limit)
    pieces = [dense(t).reshape(-1)[:: _coprime(wanted, t.numel())] for t in tensors]
    return torch.cat([piece.to(tensors[0].device) for piece in pieces]).double()


@cache
def _coprime(wanted: int, size: int) -> int:
    """The smallest number from `wanted` on that has no divisor in common with `size`."""
    stride = max(1, wanted)
    while math.gcd(stride, size) > 1:
        stride += 1
    return stride


def symmetric_limits(low: float, high: float, per_sign: int, device: torch.device) -> Tensor:
    """Upper limits (K,) of K = 2 per_sign + 1 bins: powers of two from -2^high to -2^low, 2^low to 2^high, infinity.

    The middle bin holds zero and all that is closer to it than 2^low; the first and the last are open.
    """
    exponents = low + (high - low) * torch.arange(per_sign, dtype=torch.float64, device=device) / (per_sign - 1)
    sizes = torch.exp2(exponents)
    return torch.cat([-sizes.flip(0), sizes, sizes.new_tensor([math.inf])])


def adaptive_limits(sample_S: Tensor, per_sign: int) -> Tensor:
    """Symmetric limits that span the sizes of the elements from the 1 % to the 99 % quantile, rounded to powers of two.

    Rounding keeps the bins the same from reading to reading while the scale moves by less than two.
    """
    sizes = sample_S[sample_S.isfinite() & (sample_S != 0)].abs()
    low, high = NOTHING
    if len(sizes):
        inner, outer = torch.quantile(sizes, sizes.new_tensor([INNER, OUTER])).log2().tolist()
        low, high = float(math.floor(inner)), float(max(math.ceil(outer), math.floor(inner) + 1))
    return symmetric_limits(low, high, per_sign, sample_S.device)


class Powers:
    """The elements of a float64 sample counted by power of two, from the bits of their exponents: no search in limits.

    A code is sign and exponent, and whether the element is that very power of two. The sample is bounded, and counted
    on the host.
    """

    def __init__(self, sample_S: Tensor) -> None:
        bits_S = sample_S.cpu().numpy().view(np.int64)
        code_S = (bits_S >> 52) + 2**11 + ((bits_S & (2**52 - 1)) == 0) * 2**12
        self._counts, self._size = np.bincount(code_S, minlength=CODES), len(bits_S)

    def share(self, of: Callable[[Array], Mask]) -> float:
        """The share of elements of whose size `of` is true; it is asked of a size between the same powers of two."""
        return float(self._counts[_codes_of(of)].sum() / self._size)

    def histogram(self, low: float, high: float, per_sign: int) -> Tensor:
        """`histogram` by `symmetric_limits` that are all powers of two."""
        limits_K, bins = _code_bins(low, high, per_sign)
        met = np.flatnonzero(self._counts)
        counts = np.bincount(bins[met], weights=self._counts[met], minlength=len(limits_K) + 1)
        return torch.from_numpy(np.stack([limits_K, counts[:-1]]))


CODES = 2**13


@cache
def _code_values() -> Array:
    """An element of each code; 1.5 times the lower power for those between two."""
    code = np.arange(CODES, dtype=np.int64)
    between = np.where(code // 2**12 == 1, 0, 2**51)
    return (((code % 2**12 - 2**11) << 52) | between).view(np.float64)


@cache
def _codes_of(of: Callable[[Array], Mask]) -> Mask:
    return of(np.abs(_code_values()))


@cache
def _code_bins(low: float, high: float, per_sign: int) -> tuple[Array, npt.NDArray[np.int64]]:
    """The limits, and the bin of each code; one behind the last for NaN."""
    limits_K, values = symmetric_limits(low, high, per_sign, torch.device("cpu")), torch.from_numpy(_code_values())
    bins = torch.where(values.isnan(), len(limits_K), bin_of(values, limits_K))
    return limits_K.numpy(), bins.numpy()


def bin_of(sample_S: Tensor, limits_K: Tensor) -> Tensor:
    """Number of the bin of each element, (S,): the first whose upper limit it does not exceed."""
    return torch.bucketize(sample_S, limits_K[:-1])


def histogram(sample_S: Tensor, limits_K: Tensor) -> Tensor:
    """(2, K): upper limits and counts. NaN is in no bin, infinities are in the outer ones."""
    bins_S = bin_of(sample_S, limits_K)[~sample_S.isnan()]
    return torch.stack([limits_K, torch.bincount(bins_S, minlength=len(limits_K)).double()])
