"""The run log as a sink."""

from cockpit_bench.runlog import Event, LogWriter, Record
from cockpit_bench.sinks.sink import Sink


class JsonlSink(Sink):
    """Writes every record to the run log.

    A record the log has no spelling for (a tensor among the values, say) is replaced by an event that names the
    fault: one bad value must not end the log of the whole run.
    """

    def __init__(self, writer: LogWriter) -> None:
        self.writer = writer

    def write(self, record: Record) -> None:
        try:
            self.writer.write(record)
        except (TypeError, ValueError) as error:
            detail = {"error": str(error), "record": getattr(record, "instrument", type(record).__name__)}
            self.writer.write(Event(record.step, record.seconds, "unwritable_record", detail))

    def close(self) -> None:
        self.writer.close()
