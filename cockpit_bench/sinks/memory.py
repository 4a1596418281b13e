"""Records kept in memory, for notebooks and for runs without a folder."""

from collections import deque
from collections.abc import Mapping
from types import MappingProxyType

from cockpit_bench.runlog import Reading, Record
from cockpit_bench.runlog.reading import Value
from cockpit_bench.sinks.sink import Sink


class MemorySink(Sink):
    """Keeps all records, or the last `limit` of them."""

    def __init__(self, limit: int | None = None) -> None:
        self._records: deque[Record] = deque(maxlen=limit)
        self._latest: dict[str, Mapping[str, Value]] = {}

    @property
    def records(self) -> list[Record]:
        """What is kept, oldest first."""
        return list(self._records)

    @property
    def latest(self) -> Mapping[str, Mapping[str, Value]]:
        """The values of each instrument's last reading that was ok, whatever the limit."""
        return MappingProxyType(self._latest)

    def write(self, record: Record) -> None:
        self._records.append(record)
        if isinstance(record, Reading) and record.status == "ok":
            self._latest[record.instrument] = record.values

    def close(self) -> None:
        """Nothing to finish; the records stay readable."""
