"""Takes the readings that are due, and turns whatever happens into records: the instruments' side of the cockpit.

A reading is `ok`, `skipped` (the budget) or `failed` (with the reason). A stretch of skips or failures is one record;
an instrument that fails three times in a row is retired with an event.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cockpit_bench.cadence import Budget, never
from cockpit_bench.clock import Clock
from cockpit_bench.panels import Slot
from cockpit_bench.runlog import Event, Reading, Record
from instruments.instrument import Estimate, Instrument, Scalar, State, Values
from instruments.needs import CURVATURES
from instruments.probe import Probe
from instruments.refusal import Refusal
from instruments.view import View

FAILURES_TO_RETIRE = 3
WARM = 0.3  # of the seconds of a first reading, which is cold and checks what is checked once a run
Emit = Callable[[Record], None]


class Station:
    """One slot at work: its memory, its price so far, and the stretch that it is in."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.state = slot.instrument.init()
        self.expected_seconds = 0.0
        self.price: float | None = None
        self.skipped = 0
        self.failures = 0
        self.skips_in_all = 0

    @property
    def label(self) -> str:
        return self.slot.label

    @property
    def instrument(self) -> Instrument:
        return self.slot.instrument

    @property
    def built_in(self) -> bool:
        """Whether the instrument is one of this library's, which are known not to write where they read."""
        return type(self.slot.instrument).__module__.startswith("instruments.")

    @property
    def retired(self) -> bool:
        return self.failures >= FAILURES_TO_RETIRE

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "slot"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self.state_dict():
            setattr(self, name, state[name])


class Readout:
    """The stations of a run, their budget, and what a reading becomes in the log."""

    def __init__(self, slots: Iterable[Slot], budget: Budget, clock: Clock, emit: Emit, *, strict: bool) -> None:
        self.stations = [Station(slot) for slot in slots]
        self.budget, self._clock, self._emit, self._strict = budget, clock, emit, strict
        self._due: tuple[int, list[Station]] | None = None

    def due(self, step: int) -> list[Station]:
        """Stations to be read at this step, in the order of the panel. Their cadence is asked once a step."""
        if self._due is None or self._due[0] != step:
            self._due = step, [s for s in self.stations if s.slot.due(step) and not s.retired]
        return self._due[1]

    def affordable(self, stations: Iterable[Station]) -> list[Station]:
        """Those that the budget affords at this moment."""
        training = self._clock.training
        return [s for s in stations if self.budget.affords(s.label, s.expected_seconds, training)]

    def payable(self, stations: Iterable[Station], step: int) -> list[Station]:
        """Those that the budget affords; the others are logged as skipped, once a stretch."""
        chosen, training = [], self._clock.training
        for station in stations:
            if self.budget.affords(station.label, station.expected_seconds, training):
                chosen.append(station)
                continue
            station.skipped += 1
            station.skips_in_all += 1
            if station.skipped == 1:
                reason = f"over the budget: a reading takes about {station.expected_seconds * 1e3:.3g} ms"
                self._emit(Reading(station.label, step, self._clock.training, "skipped", reason=reason))
        return chosen

    def take(self, station: Station, probe: Probe) -> None:
        """Read one instrument and log what came of it. Nothing is raised unless strict."""
        with self._clock.bucket("observe", key=station.label):
            reading, error = self._reading(station, probe)
            seconds = reading.cost["seconds"]
            self.budget.pay(station.label, seconds)
            station.expected_seconds = seconds if station.expected_seconds else seconds * WARM
            if error is not None:
                self._failed(station, reading, error, lasting=not probe.stale)
            else:
                station.skipped = station.failures = 0
                self._emit(reading)

    def take_now(self, label: str, instrument: Instrument, probe: Probe, *, fresh: bool) -> Reading:
        """A reading on demand, logged whatever came of it. A label of the panel uses its memory unless `fresh`."""
        known = {s.label: s for s in self.stations if not fresh}
        station = known.get(label) or Station(Slot(label, instrument, never))
        with self._clock.bucket("observe", key=label):
            reading, fault = self._reading(station, probe)
            if fault is None:
                station.skipped = 0
            self._emit(reading)
        return reading

    def refuse(self, label: str, step: int, reason: str) -> Reading:
        """A reading on demand that there is nothing to take from."""
        reading = Reading(label, step, self._clock.training, "failed", reason=reason)
        self._emit(reading)
        return reading

    def heard(self, reading: Reading) -> Reading:
        """A reading that another process has taken for this one too."""
        self._emit(reading)
        return reading

    def _reading(self, station: Station, probe: Probe) -> tuple[Reading, Exception | None]:
        view = View(probe, station.instrument.needs)
        begun = time.perf_counter()
        fields: dict[str, Any] = {"status": "ok"}
        fault: Exception | None = None
        try:
            values, state = self._advance(station, view, probe)
            fields["values"], fields["stderr"] = plain_values(station.instrument, values)
            station.state, station.price = state, station.instrument.price(view)
        except Exception as error:
            reason = str(error) if isinstance(error, Refusal) else f"{type(error).__name__}: {error}"
            fields, fault = {"status": "failed", "reason": reason}, error
        meter = view.meter
        cost = {
            "seconds": time.perf_counter() - begun,
            "products": meter.products,
            "gradients": round(meter.gradients, 3),
        }
        if station.skipped:
            meter.provenance["skipped"] = station.skipped
        now = self._clock.training
        return Reading(station.label, probe.step, now, cost=cost, provenance=meter.provenance, **fields), fault

    def _advance(self, station: Station, view: View, probe: Probe) -> tuple[Values, State]:
        """One reading, taken again on less of the probe batches while they do not fit into memory."""
        curvature = bool(station.instrument.needs & CURVATURES)
        before = probe.held.extent if curvature else None
        while True:
            try:
                result = station.instrument.advance(view, station.state)
                break
            except torch.OutOfMemoryError:
                if not curvature or not probe.shrink():
                    raise
        if curvature and probe.held.extent != before:
            examples, keep_graphs = probe.held.extent
            detail = {"instrument": station.label, "examples": examples, "graphs_kept": keep_graphs}
            self._emit(Event(probe.step, self._clock.training, "probe_shrunk", detail))
        return result

    def _failed(self, station: Station, reading: Reading, error: Exception, *, lasting: bool) -> None:
        """Logged once a stretch; of lasting failures the last one retires the instrument."""
        if self._strict:
            raise error
        first = station.failures == 0
        station.failures += lasting or first
        if first:
            station.skipped = 0
            self._emit(reading)
        if station.retired:
            detail = {"instrument": station.label, "failures": station.failures, "reason": reading.reason}
            self._emit(Event(reading.step, reading.seconds, "retired", detail))

    @property
    def skips(self) -> dict[str, int]:
        """Readings that were due and not paid for, by label."""
        return {s.label: s.skips_in_all for s in self.stations if s.skips_in_all}

    def state_dict(self) -> dict[str, Any]:
        return {
            "budget": self.budget.state_dict(),
            "stations": {station.label: station.state_dict() for station in self.stations},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stations that the checkpoint does not know start afresh."""
        self.budget.load_state_dict(state["budget"])
        for station in self.stations:
            saved = state["stations"].get(station.label)
            if saved is not None:
                station.load_state_dict(saved)


def plain_values(instrument: Instrument, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """Values as numbers and arrays, and the standard errors; what is returned must be what was declared."""
    if set(values) != set(instrument.outputs):
        raise ValueError(f"expected the outputs {sorted(instrument.outputs)}, got {sorted(values)}")
    plain: dict[str, Any] = {}
    stderr: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Estimate):
            plain[name], stderr[name] = _plain(value.value), float(_plain(value.stderr))
        else:
            plain[name] = _plain(value)
    return plain, stderr


def _plain(value: Scalar) -> Any:
    if isinstance(value, Tensor):
        array = value.detach().float().cpu().numpy() if value.dtype.itemsize < 4 else value.detach().cpu().numpy()
        return array.item() if array.ndim == 0 else array
    return value.item() if isinstance(value, np.generic) else value
