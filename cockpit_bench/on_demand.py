"""One reading now, whatever cadence and budget say."""

from cockpit_bench.observer import Observer
from cockpit_bench.readout import Readout
from cockpit_bench.runlog import Reading
from instruments import catalogue
from instruments.instrument import Instrument
from instruments.objective import Batch


def read_now(observer: Observer, readout: Readout, instrument: str | Instrument, batch: Batch | None) -> Reading:
    """A reading of the label or instrument on this batch, or on the last one observed; logged whatever came of it.

    Raises ValueError for a name that no instrument has.
    """
    label = instrument if isinstance(instrument, str) else type(instrument).__name__
    known = {station.label: station.instrument for station in readout.stations}
    found = known.get(label) or (catalogue.make(instrument) if isinstance(instrument, str) else instrument)
    try:
        probe = observer.probe_now(batch)
    except ValueError as error:
        return readout.refuse(label, observer.loop.step, str(error))
    if probe is None:
        return readout.refuse(label, observer.loop.step, "no batch was observed yet; pass batch=...")
    with probe:
        return readout.take_now(label, found, probe, fresh=batch is not None)
