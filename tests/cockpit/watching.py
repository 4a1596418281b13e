"""A cockpit with every instrument round a training of `loop_cases`, and what its records say."""

from typing import Any

from loop_cases import Training

from cockpit_bench import Cockpit, Event, Reading
from cockpit_bench.testing.runs import quickened
from instruments import catalogue

EVERYTHING = {name: (quickened(catalogue.make(name)), 1) for name in catalogue.names()}


def watch(training: Training, **settings: Any) -> Cockpit:
    """Every instrument at every step, no budget, nothing on the screen; unless the settings say otherwise."""
    case = training.case
    own = {"loss": case.loss, "accumulate": case.accumulate, "panel": None, "budget": None, "sinks": ()}
    if "panel" not in settings:
        own["instruments"] = EVERYTHING
    return Cockpit(training.model, training.optimizers, **{**own, **settings})


def events(cockpit: Cockpit, name: str) -> list[Event]:
    return [r for r in cockpit.records if isinstance(r, Event) and r.name == name]


def readings(cockpit: Cockpit, label: str = "", status: str = "") -> list[Reading]:
    found = [r for r in cockpit.records if isinstance(r, Reading)]
    return [r for r in found if label in ("", r.instrument) and status in ("", r.status)]


def values(cockpit: Cockpit, label: str, output: str) -> list[Any]:
    return [r.values[output] for r in readings(cockpit, label, "ok")]
