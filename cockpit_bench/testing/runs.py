"""Runs of a case: without anybody, with a cockpit at every step, and with a stop and a checkpoint on the way."""

import copy
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from cockpit_bench.cockpit import Cockpit
from cockpit_bench.runlog import Event, Reading
from cockpit_bench.testing.divergences import LEFT_ALONE, Meddling
from cockpit_bench.testing.traces import state_of
from cockpit_bench.testing.training import Case, Training
from cockpit_bench.testing.witness import Testimony, witnessed
from instruments.instrument import Instrument
from instruments.view import Need

STEPS, SAVED_AT = 3, 2
Named = Mapping[str, Instrument]


@dataclass
class Watched:
    """What was seen of one run: the training step by step, the records, and each instrument by its witness."""

    traces: list[dict[str, Any]]
    readings: list[Reading]
    events: list[Event]
    seen: dict[str, Testimony]

    def essence(self, label: str) -> list[tuple[int, str]]:
        """(step, everything that a reading says except what it cost), NaN equal to itself."""
        return [
            (r.step, str([r.status, _plain(r.values), _plain(r.stderr), _plain(r.provenance), r.reason]))
            for r in self.readings
            if r.instrument == label
        ]


def quickened(instrument: Instrument) -> Instrument:
    """With few random vectors and few steps of an iteration, where it has such settings: enough for a tiny model."""
    settings = vars(instrument)
    fewer = {name: min(settings[name], most) for name, most in (("probes", 2), ("steps", 8)) if name in settings}
    return replace(cast(Any, instrument), **fewer) if fewer else instrument


def plain_run(case: Case, meddling: Meddling = LEFT_ALONE) -> list[dict[str, Any]]:
    """The trace of every step without a cockpit."""
    return _drive(Training(meddling.case(case)), None, 0, STEPS, meddling)


def watched_run(
    case: Case,
    instruments: Named,
    *,
    needs: frozenset[Need] | None = None,
    probe: Sequence[Any] | None = None,
    steps: int = STEPS,
    meddling: Meddling = LEFT_ALONE,
) -> Watched:
    """With every instrument at every step; somebody may meddle with the training."""
    seen = {label: Testimony() for label in instruments}
    healthy = meddling is LEFT_ALONE
    slots = {label: witnessed(inner, seen[label], needs, healthy=healthy) for label, inner in instruments.items()}
    training = Training(meddling.case(case))
    cockpit = _cockpit(training, slots, probe)
    traces = _drive(training, cockpit, 0, steps, meddling)
    cockpit.close()
    return _watched(traces, [cockpit], seen)


def resumed_run(case: Case, instruments: Named) -> Watched:
    """The same with a checkpoint and a new process half way: nothing lives on but what was saved."""
    seen = {label: Testimony() for label in instruments}
    fresh = copy.deepcopy(dict(instruments))
    first = Training(case)
    cockpit = _cockpit(first, {label: witnessed(inner, seen[label]) for label, inner in instruments.items()})
    traces = _drive(first, cockpit, 0, SAVED_AT)
    saved = through_a_file(first.state_dict())
    state = _saved_state(cockpit, seen)
    cockpit.close()
    second = Training(case)
    resumed = _cockpit(second, {label: witnessed(inner, seen[label]) for label, inner in fresh.items()})
    second.load_state_dict(saved)
    resumed.load_state_dict(state)
    traces += _drive(second, resumed, SAVED_AT, STEPS)
    resumed.close()
    return _watched(traces, [cockpit, resumed], seen)


def through_a_file(state: Any) -> Any:
    """Saved and loaded as torch does it by default: nothing but tensors and plain types."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


def _saved_state(cockpit: Cockpit, seen: Mapping[str, Testimony]) -> dict[str, Any]:
    """The cockpit's state through a file; what cannot go through one is left out and named."""
    state = cockpit.state_dict()
    stations = state["readout"]["stations"]
    for label in list(stations):
        try:
            stations[label] = through_a_file(stations[label])
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            seen[label].fault(f"its memory cannot be saved and loaded ({reason}); keep numbers, tensors and lists")
            del stations[label]
    others = through_a_file({key: value for key, value in state.items() if key != "readout"})
    return {**others, "readout": state["readout"]}


def _cockpit(training: Training, instruments: Named, probe: Sequence[Any] | None = None) -> Cockpit:
    slots = {label: (instrument, 1) for label, instrument in instruments.items()}
    return Cockpit(
        training.model, training.optimizers, loss=training.case.loss, accumulate=training.case.accumulate, panel=None,
        instruments=slots, probe=probe, budget=None, sinks=(),
    )  # fmt: skip


def _drive(
    training: Training, cockpit: Cockpit | None, begin: int, end: int, meddling: Meddling = LEFT_ALONE
) -> list[dict[str, Any]]:
    """Train from one step to another; the trace between observe and the step, and after it."""
    traces = []
    for step in range(begin, end):
        if step == SAVED_AT and cockpit is not None:
            # A run that goes on from a checkpoint knows no graph, and what is read in another way differs by rounding.
            cockpit._observer.probes.graphs.clear()
        for micro in range(training.case.accumulate):
            meddling.before(training, step)
            batch, loss = training.backward(step, micro)
            meddling.after(training, step)
            if cockpit is not None:
                cockpit.observe(batch, meddling.loss(loss, step))
        traces.append(state_of(training.model, training.optimizers))
        training.take_step()
        traces.append(state_of(training.model, training.optimizers))
    return traces


def _watched(traces: list[dict[str, Any]], cockpits: list[Cockpit], seen: dict[str, Testimony]) -> Watched:
    records = [record for cockpit in cockpits for record in cockpit.records]
    readings = [r for r in records if isinstance(r, Reading)]
    return Watched(traces, readings, [r for r in records if isinstance(r, Event)], seen)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.tolist() if hasattr(value, "tolist") else value
        for name, value in sorted(values.items())
        if name != "skipped"
    }
