"""How far the running statistics of batch normalisation are from those of the batch.

Shapes: C = channels of one layer, M = layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from instruments.instrument import Gauge, Output, Values
from instruments.layout import Layout
from instruments.network._calls import Call, Calls, shown
from instruments.refusal import Refusal
from instruments.view import Need, View

SHIFT = 0.2
RATIO = (0.7, 1.4)


@dataclass(frozen=True)
class NormalisationStatistics(Gauge):
    """The mean and variance that evaluation will use (running), against those of the step's batch, channel by channel.

    With batch mean m_c and unbiased batch variance s_c^2 over all n examples and positions of a channel,

        distance_c = |running mean_c - m_c| / s_c,      ratio_c = running variance_c / s_c^2.

    A channel is off when its distance is above 0.2 or its ratio outside [0.7, 1.4]. Many channels that are off mean
    that the model evaluates as another function than the one that is trained: batches too small for their statistics, a
    momentum of 1 or of nearly 0, inputs of evaluation from elsewhere, or weights that move faster than the average.

    A batch has noise of its own: with exact running statistics the distance is still about 1/sqrt(n), which is `noise`,
    and the ratio is off by sqrt(2/n); below n = 100 the shares say more of the batch than of the average. The batch has
    already gone into the running statistics once, by training, so the distance is understated by the factor
    1 - momentum. A channel that is constant in the batch has the ratio infinity. Read in train and eval mode alike; of
    several calls of a layer, and of micro-batches, the batch statistics are pooled.
    """

    outputs: ClassVar[Mapping[str, Output]] = {
        "off": Output("1", "share of all channels whose distance or variance ratio is out of bounds", edge=0.25),
        "noise": Output("batch std", "distance that the batch shows by chance: 1/sqrt(n), largest over the layers"),
        "distance": Output(
            "batch std", "root mean square over the channels of the distance of the means", "per-module"
        ),
        "variance_ratio": Output("1", "median over the channels of running over batch variance", "per-module"),
        "shifted": Output("1", "share of channels whose means are more than 0.2 batch std apart", "per-module"),
        "rescaled": Output("1", "share of channels whose variance ratio is outside [0.7, 1.4]", "per-module"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"forward"})
    reference: ClassVar[str] = "Wu and Johnson 2021, Rethinking Batch in BatchNorm, section 3"

    def price(self, view: View) -> float:
        return 0.5

    def read(self, view: View) -> Values:
        running, sums = view.forward(lambda: _by_layer(view.layout))
        if not sums:
            raise Refusal(
                "the model calls no batch normalisation with running statistics; there is nothing to compare."
            )
        names = list(sums)
        layers = [_Layer.of(sums[name], running[name][1]) for name in names]
        off = torch.cat([layer.shifted_C | layer.rescaled_C for layer in layers])
        listed = shown(names)
        view.meter.provenance["modules"] = [names[i] for i in listed]
        return {
            "off": off.double().mean(),
            "noise": torch.stack([layer.n for layer in layers]).min().rsqrt(),
            "distance": torch.stack([layers[i].distance_C.square().mean().sqrt() for i in listed]),
            "variance_ratio": torch.stack([layers[i].ratio_C.nanquantile(0.5) for i in listed]),
            "shifted": torch.stack([layers[i].shifted_C.double().mean() for i in listed]),
            "rescaled": torch.stack([layers[i].rescaled_C.double().mean() for i in listed]),
        }


@contextmanager
def _by_layer(layout: Layout) -> Iterator[tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]]:
    """The running mean and variance of each layer, and the sums of what goes into it."""
    running: dict[str, tuple[Tensor, Tensor]] = {}
    sums: dict[str, Tensor] = {}

    def enter(call: Call) -> None:  # before the forward moves the running statistics
        m = call.module
        if isinstance(m, _BatchNorm) and m.running_mean is not None and m.running_var is not None:
            running.setdefault(call.label, (m.running_mean.double(), m.running_var.double()))

    def leave(call: Call, inputs: Sequence[Tensor], _outputs: Sequence[Tensor]) -> None:
        name = call.label
        if name in running and inputs:
            new = _sums(inputs[0], running[name][0])
            sums[name] = sums[name] + new if name in sums else new

    with Calls(layout, enter=enter, leave=leave):
        yield running, sums


@dataclass(frozen=True)
class _Layer:
    """One layer's channels against their running statistics; n = examples and positions of a channel."""

    n: Tensor
    distance_C: Tensor
    ratio_C: Tensor
    shifted_C: Tensor
    rescaled_C: Tensor

    @classmethod
    def of(cls, sums_3C: Tensor, running_var_C: Tensor) -> "_Layer":
        n, shift_C = sums_3C[0, 0], sums_3C[1] / sums_3C[0]
        variance_C = (sums_3C[2] - n * shift_C.square()) / (n - 1)
        distance_C = shift_C.abs() / variance_C.clamp(min=0).sqrt()
        ratio_C = running_var_C / variance_C
        # Written so that NaN counts as out of bounds: a channel that is not finite is no healthy one.
        return cls(n, distance_C, ratio_C, ~(distance_C <= SHIFT), ~((ratio_C >= RATIO[0]) & (ratio_C <= RATIO[1])))


def _sums(x: Tensor, centre_C: Tensor) -> Tensor:
    """(3, C) in float64: elements of a channel, and the sums of x - centre and of its square over them."""
    over = [dim for dim in range(x.ndim) if dim != 1]
    variance_C, mean_C = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), over, correction=0)
    n, shift_C = x.numel() / x.shape[1], mean_C.double() - centre_C
    return torch.stack([torch.full_like(shift_C, n), n * shift_C, n * (variance_C.double() + shift_C.square())])
