"""A function as a sink."""

from collections.abc import Callable

from cockpit_bench.runlog import Record
from cockpit_bench.sinks.sink import Sink


class CallbackSink(Sink):
    """Calls a function with every record, for instance to forward them to another logging service."""

    def __init__(self, function: Callable[[Record], object]) -> None:
        self.function = function

    def write(self, record: Record) -> None:
        self.function(record)

    def close(self) -> None:
        """Nothing to finish; the function's owner closes what it opened."""
