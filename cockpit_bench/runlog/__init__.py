"""The run log: append-only JSON lines, one record per line, readable while they are written and after a crash.

Everything else (TensorBoard, plots, rules, scores) is a view of this log. Nothing here imports torch.
"""

from cockpit_bench.runlog.codec import decode, encode
from cockpit_bench.runlog.folder import RunFolder
from cockpit_bench.runlog.header import SCHEMA, Header, SchemaError, new_header
from cockpit_bench.runlog.reader import Follower, current, read_run
from cockpit_bench.runlog.reading import Event, Metrics, Outcome, Reading, Record
from cockpit_bench.runlog.run import Readings, Run, Series
from cockpit_bench.runlog.writer import LogWriter

__all__ = [
    "SCHEMA",
    "Event",
    "Follower",
    "Header",
    "LogWriter",
    "Metrics",
    "Outcome",
    "Reading",
    "Readings",
    "Record",
    "Run",
    "RunFolder",
    "SchemaError",
    "Series",
    "current",
    "decode",
    "encode",
    "new_header",
    "read_run",
]
