"""One reading now, whatever cadence and budget say."""

from dataclasses import replace
from typing import Any

import torch

from cockpit_bench.observer import Observer
from cockpit_bench.readout import Readout
from cockpit_bench.runlog import Reading
from instruments import catalogue
from instruments.instrument import Instrument
from instruments.meter import Meter
from instruments.needs import RUNS_MODEL
from instruments.objective import Batch
from instruments.operators.ranks import DONE, SUMMED, Ranks, follow
from instruments.probe import Probe
from instruments.refusal import Refusal


def read_now(
    observer: Observer, readout: Readout, instrument: str | Instrument, batch: Batch | None, group: Any = None
) -> Reading:
    """A reading of the label or instrument on this batch, or on the last one observed; logged whatever came of it.

    With a process group it is of the batches of all its processes. Raises ValueError for a name that no instrument has.
    """
    label = instrument if isinstance(instrument, str) else type(instrument).__name__
    known = {station.label: station.instrument for station in readout.stations}
    found = known.get(label) or (catalogue.make(instrument) if isinstance(instrument, str) else instrument)
    try:
        probe = observer.probes.on_demand(observer.loop, batch)
        if probe is None:
            raise ValueError("no batch was observed yet; pass batch=...")
    except ValueError as error:
        return readout.refuse(label, observer.loop.step, str(error))
    if group is not None:
        return _read_together(observer, readout, label, found, probe, batch is not None, Ranks(group))
    with probe:
        return readout.take_now(label, found, probe, fresh=batch is not None)


def _read_together(
    observer: Observer, readout: Readout, label: str, instrument: Instrument, probe: Probe, given: bool, ranks: Ranks
) -> Reading:
    """The first process of the group reads, the others lend their products, and all of them log the same."""
    runs = instrument.needs & RUNS_MODEL
    if not runs or not runs <= set(SUMMED):
        reason = (
            f"expected an instrument of the {' or the '.join(SUMMED)} to be read over processes, got {label}; "
            "the others describe the process that takes them."
        )
        return readout.refuse(label, probe.step, reason)
    about = {"instrument": repr(instrument), "step": probe.step, "parameters": probe.layout.size, "batch given": given}
    try:
        with probe:
            ranks = ranks.meet(about, probe.held.examples)
            if ranks.leads:
                return _lead(readout, label, instrument, probe, given, ranks)
            like_D = torch.zeros(probe.layout.size, dtype=probe.layout.dtype, device=probe.layout.device)
            failure = follow(lambda matrix: getattr(probe.curvatures, matrix)(Meter()), ranks, like_D)
            reading: Reading = ranks.share(None)
    except (Refusal, RuntimeError) as error:
        return readout.refuse(label, probe.step, str(error))
    if failure is not None:
        reading = replace(reading, reason=f"{reading.reason} Here: {type(failure).__name__}: {failure}")
    return readout.heard(reading)


def _lead(readout: Readout, label: str, instrument: Instrument, probe: Probe, given: bool, ranks: Ranks) -> Reading:
    probe.curvatures.ranks = ranks
    try:
        reading = readout.take_now(label, instrument, probe, fresh=given)
    finally:
        ranks.order(DONE, 0, probe.layout.device)
    ranks.share(reading)
    return reading
