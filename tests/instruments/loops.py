"""Short training loops whose gradients are written down, so that a twin can build what an optimizer should know."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cases import Built
from torch import Tensor, optim
from twins import total_loss, trainable

from instruments import Probe, View
from instruments.instrument import Instrument
from instruments.objective import as_objective


@dataclass(frozen=True)
class Loop:
    """A run that stands at observe. `history`: the gradient (None where there is none) and the value of each trained
    parameter at every step, the present one last."""

    built: Built
    optimizers: Sequence[optim.Optimizer]
    history: dict[str, list[tuple[Tensor | None, Tensor]]]

    def probe(self) -> Probe:
        return Probe(self.built.model, as_objective(self.built.loss), self.optimizers, [self.built.batch])


def run(built: Built, optimizers: Sequence[optim.Optimizer], steps: int) -> Loop:
    """`steps` steps and one more backward; the gradients differ from step to step by a factor of up to ten."""
    params = trainable(built.model)
    history: dict[str, list[tuple[Tensor | None, Tensor]]] = {name: [] for name in params}
    for t in range(steps + 1):
        for p in params.values():
            p.grad = None
        (total_loss(built.model, built.loss, built.batch) * (1 + 3 * (t % 4))).backward()
        for name, p in params.items():
            history[name].append((None if p.grad is None else p.grad.clone(), p.detach().clone()))
        if t < steps:
            for optimizer in optimizers:
                optimizer.step()
    return Loop(built, optimizers, history)


def read(loop: Loop, instrument: Instrument) -> dict[str, Any]:
    """A reading at observe."""
    with loop.probe() as probe:
        return dict(instrument.advance(View(probe, instrument.needs), instrument.init())[0])


def read_after_step(loop: Loop, instrument: Instrument) -> dict[str, Any]:
    """A reading after the next step."""
    probe = loop.probe()
    probe.remember()
    for optimizer in loop.optimizers:
        optimizer.step()
    with probe:
        return dict(instrument.advance(View(probe, instrument.needs), instrument.init())[0])
