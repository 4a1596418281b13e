"""Instruments that do what they must not: what the guard undoes, and what the comparison of `test_harmless` shows."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from loop_cases import Case, Training, mlp
from torch import nn
from watching import readings, watch

from cockpit_bench import Gauge, Output
from cockpit_bench.testing.traces import differences, objects_of, state_of
from instruments.instrument import Values
from instruments.probe import Probe
from instruments.view import Need, View

Deed = Callable[[Probe], Any]


@dataclass(frozen=True)
class Offender(Gauge):
    """Does something to the training run that it looks at."""

    deed: Deed = field(default=lambda probe: None)

    outputs: ClassVar[Mapping[str, Output]] = {"done": Output("1", "1 when the deed is done")}
    needs: ClassVar[frozenset[Need]] = frozenset()
    reference: ClassVar[str] = "none"

    def price(self, view: View) -> float:
        return 0.0

    def read(self, view: View) -> Values:
        self.deed(view._probe)
        return {"done": 1.0}


@torch.no_grad()
def nudge(probe: Probe) -> None:
    probe.layout.params[0].add_(1e-7)


def run_backward(probe: Probe) -> None:
    with torch.enable_grad():
        probe.module(probe.batches[0][0]).sum().backward()


def draw(probe: Probe | None = None) -> bool:
    torch.rand(3), np.random.rand(), random.random()
    return True


UNDONE: Mapping[str, Deed] = {
    "draws random numbers": draw,
    "seeds": lambda probe: torch.manual_seed(0),
    "draws from the model's generator": lambda probe: torch.rand(3, generator=probe.module.owned),
    "switches to eval mode": lambda probe: probe.module.eval(),
    "runs a backward": run_backward,
    "sets a gradient": lambda probe: setattr(probe.layout.params[0], "grad", torch.zeros(8, 6)),
    "writes to a buffer": lambda probe: probe.module[2].running_mean.add_(1),
    "puts in another buffer": lambda probe: probe.module[2].register_buffer("running_var", torch.ones(8)),
    "adds a buffer": lambda probe: probe.module.register_buffer("more", torch.ones(8)),
    "leaves an attribute on a module": lambda probe: setattr(probe.module, "mark", 1),
    "raises half way": lambda probe: [probe.module.eval(), draw(), 1 / 0],
}
SEEN: Mapping[str, tuple[Deed, str]] = {
    "writes to a parameter": (nudge, "/state/parameters/0.weight"),
    "writes to a gradient": (lambda probe: probe.grads[0].mul_(2), "/state/grad/0.weight"),
    "rewrites a gradient": (lambda probe: probe.grads[0].mul_(1), "/objects/grad/0.weight"),
    "creates optimizer state": (
        lambda probe: [probe.optimizers[0].state[p] for p in probe.layout.params],
        "/state/optimizer state/0",
    ),
    "leaves a hook": (lambda probe: probe.module.register_forward_hook(print), "/state/hooks/"),
    "leaves a hook on a parameter": (
        lambda probe: probe.layout.params[0].register_hook(lambda g: None),
        "/state/tensor hooks/0.weight/0",
    ),
    "leaves an attribute": (lambda probe: setattr(probe.layout.params[0], "mark", 1), "/state/attributes/0.weight"),
    "switches gradients off": (lambda probe: torch.set_grad_enabled(False), "/objects/process"),
}


def generating() -> nn.Module:
    model = mlp(nn.BatchNorm1d(8))
    model.owned = torch.Generator().manual_seed(1)
    return model


def traces_of_one_step(deed: Deed, due: Any = 1) -> tuple[list[str], str]:
    """What differs after one observation, and the reading's status."""
    training = Training(Case("one step", generating))
    cockpit = watch(training, instruments={"offender": (Offender(deed), due)})
    batch, loss = training.backward(0)

    def look() -> dict[str, Any]:
        return {"state": state_of(training.model, training.optimizers), "objects": both()}

    def both() -> dict[str, Any]:
        return objects_of(training.model, training.optimizers)

    before = look()
    cockpit.observe(batch, loss)
    found = differences(before, look())
    torch.set_grad_enabled(True)
    cockpit.close()
    return found, readings(cockpit, "offender")[0].status


@pytest.mark.parametrize("name", UNDONE)
def test_what_the_guard_undoes(name: str) -> None:
    found, status = traces_of_one_step(UNDONE[name])
    assert found == []
    assert status == ("failed" if "raises" in name else "ok")


@pytest.mark.parametrize("name", SEEN)
def test_what_the_comparison_shows(name: str) -> None:
    deed, path = SEEN[name]
    found, _ = traces_of_one_step(deed)
    assert any(where.startswith(path) for where in found), found


def test_drawing_outside_of_a_reading_is_seen() -> None:
    """A cadence is asked before the guard is there."""
    found, _ = traces_of_one_step(lambda probe: None, due=lambda step: draw())
    assert {where[: len("/state/random/0")] for where in found} == {f"/state/random/{i}" for i in (0, 2, 3)}


def test_an_honest_instrument_leaves_no_trace() -> None:
    assert traces_of_one_step(lambda probe: None) == ([], "ok")
