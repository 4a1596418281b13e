"""What the inputs of the step's batch look like: scale, zeros, broken numbers; for tokens their variety."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from instruments.batch._fields import inputs_of
from instruments.instrument import Gauge, Output, Values
from instruments.refusal import Refusal
from instruments.view import Need, View


@dataclass(frozen=True)
class InputMoments(Gauge):
    """Moments of all floating input tensors together, and variety of the integer ones.

    Inputs are all tensors of the batch apart from the targets: the second of a pair, or the entry "labels", "targets"
    or "y" of a mapping. Inputs that were not standardised (a mean many deviations from 0, pixels from 0 to 255) make
    the first layer's curvature grow by the square of their scale. Mean, deviation (without Bessel's correction) and
    extremes are over the finite numbers; NaN where there are no floating inputs. They are over all features together,
    so features of different scale show in `std` only as a large spread.

    Of several integer tensors (tokens, positions, masks) the one with the most distinct values is read; raw pixels in
    bytes count as integers. Booleans and complex numbers are not read.
    """

    outputs: ClassVar[Mapping[str, Output]] = {
        "mean": Output("input", "mean of the floating inputs"),
        "std": Output("input", "standard deviation of the floating inputs"),
        "min": Output("input", "smallest finite input"),
        "max": Output("input", "largest finite input"),
        "zeros": Output("1", "share of exact zeros among the floating inputs"),
        "not_finite": Output("1", "share of NaN and infinite values among the floating inputs"),
        "distinct": Output("tokens", "distinct values among the integer inputs; NaN without any"),
        "top_share": Output("1", "share of the most frequent value among the integer inputs; NaN without any"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"batch"})
    reference: ClassVar[str] = "LeCun et al. 1998, Efficient BackProp, section 4.3"

    def price(self, view: View) -> float:
        return 0.0

    def read(self, view: View) -> Values:
        tensors = [t for batch in view.batches for t in inputs_of(batch) if t.numel()]
        if any(t.is_nested or t.layout is not torch.strided for t in tensors):
            raise Refusal("sparse and nested inputs have no moments here; pass the batch with dense tensors.")
        floats = [t for t in tensors if t.is_floating_point()]
        whole = [t for t in tensors if not t.is_floating_point() and not t.is_complex() and t.dtype != torch.bool]
        if not floats and not whole:
            raise Refusal("the batch holds no input tensor of floating or integer numbers.")
        return {**_moments(floats), **_variety(whole, len(view.batches))}


def _moments(tensors: Sequence[Tensor]) -> dict[str, Tensor | float]:
    """One pass over at least single precision, in double only where sums are formed."""
    if not tensors:
        return dict.fromkeys(("mean", "std", "min", "max", "zeros", "not_finite"), math.nan)
    flat = [t.detach().flatten().to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    x = torch.cat(flat) if len(flat) > 1 else flat[0]
    finite = x[x.isfinite()]
    shares: dict[str, Tensor | float] = {
        "zeros": (x.numel() - torch.count_nonzero(x)) / x.numel(),
        "not_finite": 1 - finite.numel() / x.numel(),
    }
    if not finite.numel():
        return shares | dict.fromkeys(("mean", "std", "min", "max"), math.nan)
    variance, mean = torch.var_mean(finite, correction=0)
    low, high = finite.aminmax()
    return {"mean": mean, "std": variance.sqrt(), "min": low, "max": high, **shares}


def _variety(tensors: Sequence[Tensor], batches: int) -> dict[str, float]:
    """Each field of the batch on its own over the micro-batches; the most varied counts."""
    fields = len(tensors) // batches
    best = {"distinct": math.nan, "top_share": math.nan}
    for field in range(fields):
        values = torch.cat([t.flatten() for t in tensors[field::fields]])
        counts = torch.unique(values, return_counts=True)[1]
        if not len(counts) <= best["distinct"]:
            best = {"distinct": float(len(counts)), "top_share": float(counts.max()) / values.numel()}
    return best
