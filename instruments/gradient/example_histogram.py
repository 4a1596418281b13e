"""Histogram of the elements of single examples' gradients.

Shapes: K = bins, M = examples that are read, S = sampled elements.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor

from instruments.example_gradients import usual_price
from instruments.gradient._bins import adaptive_limits, histogram, strided_sample, symmetric_limits
from instruments.gradient._tensors import dense
from instruments.gradient.histogram import FIXED, PER_SIGN, Bins
from instruments.instrument import Estimate, Gauge, Output, Values
from instruments.view import Need, View


@dataclass(frozen=True)
class ExampleHistogram(Gauge):
    """Counts of the elements of the gradients g_i of single examples, in the bins of `gradient/histogram`.

    The mean that the optimizer is given is far smaller than what it averages, and its elements look normal whatever
    those of the examples look like: heavy tails, and examples without any gradient, show here alone. Of N examples
    every s-th is read, at most `examples` of them, by a backward pass each; of their elements about `sample` in all are
    counted, every s-th of each tensor, without random numbers. Nothing is cut off: the middle bin holds zeros and what
    is closer to zero than the bins reach, the outer ones all that is beyond. NaN is counted nowhere but in
    `not_finite`; one example that is not finite may make NaN of those that are read with it. `zeros` and `largest` are
    over all elements of the examples read, and the standard error of the first is that over examples, NaN where a
    single one is read. Parameters that the loss does not depend on are left out.

    The unit is that of the gradient: the mean of the g_i over all examples is the gradient of the loss. Original
    Cockpit counts all N x D elements, in bins of equal width between -2 and 2, which holds nearly everything in two.
    """

    bins: Bins = "fixed"
    examples: int = 8
    sample: int = 2**14

    outputs: ClassVar[Mapping[str, Output]] = {
        "histogram": Output("loss / parameter", "counts of elements of examples' gradients by size, sign", "histogram"),
        "zeros": Output("1", "share of the elements that are exactly zero; its error may be NaN"),
        "largest": Output("loss / parameter", "largest size of an element; NaN if one is"),
        "not_finite": Output("1", "share of the sampled elements that are NaN or infinite"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"example_gradients"})
    reference: ClassVar[str] = "Schneider, Dangel and Hennig 2021, Cockpit, section 2.2"

    def __post_init__(self) -> None:
        if self.bins not in get_args(Bins):
            raise ValueError(f"expected bins to be one of {', '.join(get_args(Bins))}, got {self.bins!r}.")
        if self.sample < 1:
            raise ValueError(f"expected a sample of at least one element, got {self.sample}.")
        if self.examples < 1:
            raise ValueError(f"expected at least one example, got {self.examples}.")

    def price(self, view: View) -> float:
        return usual_price(view.examples or self.examples, self.examples)

    def read(self, view: View) -> Values:
        seen = view.example_gradients(self.examples, self._look)
        samples, zeros, largest = zip(*seen, strict=True)
        sample_S, zeros_M = torch.cat(samples), torch.stack(zeros)
        view.meter.provenance["examples"] = len(seen)
        limits_K = (
            adaptive_limits(sample_S, PER_SIGN)
            if self.bins == "adaptive"
            else symmetric_limits(*FIXED, sample_S.device)
        )
        return {
            "histogram": histogram(sample_S, limits_K),
            "zeros": Estimate(zeros_M.mean(), zeros_M.std() / len(seen) ** 0.5 if len(seen) > 1 else float("nan")),
            "largest": torch.stack(largest).max(),
            "not_finite": (~sample_S.isfinite()).double().mean(),
        }

    def _look(self, grads: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Of one example: a sample of the elements, the share of zeros, and the largest size."""
        tensors = [dense(g) for g in grads if g.numel()]
        count = torch.stack([torch.count_nonzero(g).to(tensors[0].device) for g in tensors]).sum()
        largest = torch.stack([g.abs().max().to(tensors[0].device, torch.float64) for g in tensors]).max()
        zeros = 1 - count.double() / sum(g.numel() for g in tensors)
        return strided_sample(tensors, max(1, self.sample // self.examples)), zeros, largest
