"""Names of the modules that a reading is about: in the log once and again when they change, not in every record.

An instrument of modules leaves their names in `provenance["modules"]`. In the log file that entry is their number, and
the event `modules` before it has the names; reading the log puts them back. Records in memory always have the names.
"""

from collections.abc import Iterator
from dataclasses import replace

from cockpit_bench.runlog.reading import Event, Reading, Record

KEY = "modules"


class ModuleNames:
    """The names that the log has said so far, by instrument: one for each opening of a log, one for each reader."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def shortened(self, record: Record) -> Iterator[Record]:
        """What is written for a record. Names count as said once the next record is asked for, after a write."""
        names = record.provenance.get(KEY) if isinstance(record, Reading) else None
        if not isinstance(record, Reading) or not isinstance(names, list):
            yield record
            return
        if self._names.get(record.instrument) != names:
            yield Event(record.step, record.seconds, KEY, {"instrument": record.instrument, "names": names})
            self._names[record.instrument] = list(names)
        yield replace(record, provenance={**record.provenance, KEY: len(names)})

    def restored(self, record: Record) -> Record:
        """Inverse of `shortened`, record by record; a number whose event was lost stays a number."""
        if isinstance(record, Event) and record.name == KEY and isinstance(record.detail.get("names"), list):
            self._names[str(record.detail.get("instrument"))] = record.detail["names"]
        if not isinstance(record, Reading):
            return record
        names = self._names.get(record.instrument)
        if names is None or record.provenance.get(KEY) != len(names):
            return record
        return replace(record, provenance={**record.provenance, KEY: list(names)})


def names_of(reading: Reading, count: int) -> list[str]:
    """What the `count` entries of a per-module value are called: their modules, or numbers where those do not fit."""
    names = reading.provenance.get(KEY)
    if isinstance(names, list) and len(set(names)) == len(names) == count:
        return names
    return [str(index) for index in range(count)]
