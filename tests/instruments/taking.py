"""One reading of an instrument on a case, in the places where a loop would take it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from cases import BY_NAME, Built, build
from torch import Tensor, nn
from twins import total_loss, trainable

from instruments import Probe, View
from instruments.instrument import Instrument
from instruments.objective import as_objective

SOME = ["mlp", "mlp_weighted", "cnn", "tied_attention", "recurrent", "called_twice_unused", "frozen"]


class Mean(nn.Module):
    """loss_i = 1/2 |theta - x_i|^2: gradient theta - x_i, covariance that of x."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.theta - x).square().sum(1) / 2


def losses(call: Any, x: Any) -> Tensor:
    return call(x)


def mean_of(x: Tensor) -> Built:
    """The problem whose gradients of single examples are the rows of -x."""
    return Built(Mean(x.shape[1]), losses, x)


def case(name: str, seed: int = 0) -> Built:
    """The case with a gradient in `.grad`."""
    built = build(BY_NAME[name], seed)
    total_loss(built.model, built.loss, built.batch).backward()
    return built


def take(
    instrument: Instrument,
    built: Built,
    optimizers: Sequence[Any] = (),
    *,
    batches: Sequence[Any] | None = None,
    move: Callable[[], Any] | None = None,
    state: Any = None,
    step: int = 0,
) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """Values, next memory and provenance. `move` is the step that is taken between remembering and reading."""
    probe = Probe(built.model, as_objective(built.loss), optimizers, batches or [built.batch], step=step)
    if move is not None:
        probe.remember()
        with torch.no_grad():
            move()
    with probe:
        view = View(probe, instrument.needs)
        values, after = instrument.advance(view, instrument.init() if state is None else state)
    assert set(values) == set(instrument.outputs)
    return dict(values), after, view.meter.provenance


def sizes(built: Built) -> list[int]:
    return [p.numel() for p in trainable(built.model).values()]
