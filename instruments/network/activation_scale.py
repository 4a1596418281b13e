"""How large the output of each layer is, and how its size changes over depth.

Shapes: M = layers (modules that call no other module), in the order of their first call.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from instruments.instrument import Estimate, Gauge, Output, Values
from instruments.layout import Layout, norms_of
from instruments.network._calls import Call, Calls, refuse_empty, shown
from instruments.view import Need, View


@dataclass(frozen=True)
class ActivationScale(Gauge):
    """Root mean square, mean and share of exact zeros of each layer's output on the step's batch.

    A layer is a module that calls no other module; its numbers are over all examples, positions, units, calls and
    micro-batches together, so one `nn.ReLU` object that is used in ten places is one layer. They are taken at the time
    of the call: what an activation in place overwrites is read before. Of several outputs the first tensor counts;
    outputs of integers are left out, and so is what is written without a module (`F.relu`, residual additions).

    `slope` is that of a straight line through log RMS against depth, over the layers with a weight of two dimensions or
    more (linear, convolution, embedding, recurrent), numbered in the order of their first call. Signals that shrink
    by the factor k a layer give log k; |slope| above 0.5 at step 0 is a gain that is wrong in every layer. Its standard
    error is that of least squares: large where depth and size have no straight line in common, as in networks whose
    widths change or that normalise now and then. One layer that is exactly zero makes it NaN.

    At most 200 layers are listed, at even distances; the slope is over all of them.
    """

    outputs: ClassVar[Mapping[str, Output]] = {
        "slope": Output("1", "change of log RMS from one weight layer to the next; 0 where the scale is kept"),
        "rms": Output("activation", "root mean square of each layer's output", "per-module"),
        "mean": Output("activation", "mean of each layer's output", "per-module"),
        "zeros": Output("1", "share of exact zeros in each layer's output", "per-module"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"forward"})
    reference: ClassVar[str] = (
        "Glorot and Bengio 2010, Understanding the difficulty of training deep networks, sec. 4.2"
    )

    def price(self, view: View) -> float:
        return 0.5

    def read(self, view: View) -> Values:
        sums, weighted = view.forward(lambda: _by_layer(view.layout))
        refuse_empty(sums, "a layer that gives numbers")
        count_M, sum_M, squares_M, zeros_M = torch.stack(list(sums.values()), 1)
        rms_M = (squares_M / count_M).sqrt()
        names = list(sums)
        listed = shown(names)
        view.meter.provenance["modules"] = [names[i] for i in listed]
        return {
            "slope": slope(rms_M[[i for i, name in enumerate(names) if name in weighted]].log()),
            "rms": rms_M[listed],
            "mean": (sum_M / count_M)[listed],
            "zeros": (zeros_M / count_M)[listed],
        }


@contextmanager
def _by_layer(layout: Layout) -> Iterator[tuple[dict[str, Tensor], set[str]]]:
    """The sums of each layer's output, and which layers have a weight of two dimensions or more."""
    sums: dict[str, Tensor] = {}
    weighted: set[str] = set()

    def leave(call: Call, _inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        if call.leaf and outputs and outputs[0].is_floating_point():
            name = call.label
            new = _sums(outputs[0])
            sums[name] = sums[name] + new if name in sums else new
            if any(p.ndim >= 2 for p in call.module.parameters(recurse=False)):
                weighted.add(name)

    with Calls(layout, leave=leave):
        yield sums, weighted


def _sums(x: Tensor) -> Tensor:
    """(4,) in float64: elements, their sum, the sum of their squares, how many are zero; no synchronisation."""
    total = x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).double()
    zeros = x.numel() - torch.count_nonzero(x)
    return torch.stack([total.new_tensor(x.numel()), total, norms_of([x])[0].double() ** 2, zeros.double()])


def slope(y_M: Tensor) -> Estimate:
    """Least squares of y against 0, 1, 2, ...; NaN for fewer than two points, without an error for two."""
    n = len(y_M)
    x_M = torch.arange(n, dtype=y_M.dtype, device=y_M.device) - (n - 1) / 2
    spread = x_M.square().sum()
    value = (x_M * y_M).sum() / spread
    rest = (y_M - y_M.mean() - value * x_M).square().sum()
    return Estimate(value, (rest / (n - 2) / spread).sqrt() if n > 2 else float("nan"))
