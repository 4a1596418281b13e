"""Many sinks as one, none of which can stop the training."""

import contextlib
import sys
from collections.abc import Callable, Iterable

from cockpit_bench.runlog import Event, Record
from cockpit_bench.sinks.sink import Sink


def _complain(message: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(message, file=sys.stderr)


class Fanout(Sink):
    """Hands every record to every sink.

    A sink that raises is closed and left out from then on. `on_failure` gets one message (by default it goes to
    stderr; a warning could be turned into an exception by the user's filters) and the other sinks get a
    `sink_disabled` event.
    """

    def __init__(self, sinks: Iterable[Sink], on_failure: Callable[[str], None] = _complain) -> None:
        self._sinks = list(sinks)
        self._on_failure = on_failure

    @property
    def sinks(self) -> tuple[Sink, ...]:
        """The sinks that still work."""
        return tuple(self._sinks)

    def add(self, open_sink: Callable[[], Sink]) -> None:
        """Open one more sink; when that fails there is a message, and the run goes on without it."""
        try:
            self._sinks.append(open_sink())
        except Exception as error:
            self._on_failure(f"cockpit: a sink cannot be opened, training goes on. {type(error).__name__}: {error}")

    def write(self, record: Record) -> None:
        failures = []
        for sink in self.sinks:
            try:
                sink.write(record)
            except Exception as error:
                failures.append(self._disable(sink, error))
        for detail in failures:
            self.write(Event(record.step, record.seconds, "sink_disabled", detail))

    def _disable(self, sink: Sink, error: Exception) -> dict[str, str]:
        self._sinks.remove(sink)
        with contextlib.suppress(Exception):
            sink.close()
        detail = {"sink": type(sink).__name__, "error": f"{type(error).__name__}: {error}"}
        self._on_failure(f"cockpit: {detail['sink']} failed and is switched off, training goes on. {detail['error']}")
        return detail

    def close(self) -> None:
        """Close all; one that fails at it is reported, and the rest are closed all the same."""
        for sink in self.sinks:
            try:
                sink.close()
            except Exception as error:
                self._disable(sink, error)
