"""Records as TensorBoard scalars with grouped tags; the log stays the truth, this is a view of it."""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cockpit_bench.runlog import Event, Metrics, Outcome, Reading, Record
from cockpit_bench.runlog.codec import spell
from cockpit_bench.sinks.sink import Sink

LONGEST_VECTOR = 8


class TensorBoardSink(Sink):
    """Writes one event file. Tags:

    `<instrument>/<output>` (`.../0`, `.../1` for vectors of at most 8 entries), `<instrument>/<output>_stderr`,
    `metrics/<name>` for evaluations, `user/<name>` for the user's own scalars, `events/<name>` as text, and with every
    evaluation `tax/<instrument>`, the seconds that the instrument has taken so far. Larger arrays are left to the log.
    `purge_step` hides the points that earlier event files of a resumed run have at that step or later.
    """

    def __init__(self, folder: str | os.PathLike[str], *, purge_step: int | None = None) -> None:
        # Imported here: it brings torch with it, and 0.2 s, which only runs that write events should pay.
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(os.fspath(folder), purge_step=purge_step)
        self._tax: dict[str, float] = {}

    def write(self, record: Record) -> None:
        match record:
            case Reading():
                self._write_reading(record)
            case Metrics(values=values, source=source):
                group = "metrics" if source == "evaluation" else "user"
                self._write_scalars(group, values, record.step)
                if source == "evaluation":
                    self._write_scalars("tax", self._tax, record.step)
                    self._writer.flush()
            case Event(name=name, detail=detail):
                self._write_text(name, detail, record.step)
            case Outcome(status=status, reason=reason):
                self._write_text("outcome", {"status": status, "reason": reason}, record.step)

    def _write_reading(self, reading: Reading) -> None:
        if reading.status == "ok":
            self._write_scalars(reading.instrument, reading.values, reading.step)
            doubts = {f"{output}_stderr": doubt for output, doubt in reading.stderr.items()}
            self._write_scalars(reading.instrument, doubts, reading.step)
        if "seconds" in reading.cost:
            self._tax[reading.instrument] = self._tax.get(reading.instrument, 0.0) + reading.cost["seconds"]

    def _write_scalars(self, group: str, values: Mapping[str, Any], step: int) -> None:
        for name, value in values.items():
            for tag, number in _points(f"{group}/{name}", value):
                self._writer.add_scalar(tag, number, step)

    def _write_text(self, name: str, detail: Mapping[str, Any], step: int) -> None:
        self._writer.add_text(f"events/{name}", json.dumps(spell(detail)), step)

    def close(self) -> None:
        self._writer.flush()
        self._writer.close()


def _points(tag: str, value: Any) -> Iterator[tuple[str, float]]:
    """A scalar as itself, a short vector entry by entry, anything else not at all."""
    if isinstance(value, int | float | np.number | np.bool_):
        yield tag, float(value)
        return
    try:
        vector = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        return
    if vector.ndim == 0:
        yield tag, float(vector)
    elif vector.ndim == 1 and len(vector) <= LONGEST_VECTOR:
        for index, entry in enumerate(vector):
            yield f"{tag}/{index}", float(entry)
