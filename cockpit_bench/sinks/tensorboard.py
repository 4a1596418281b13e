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

    `about` is what the log's header says of the run: the custom-scalar tab gets charts of rho with its edge, of the
    metric with its target, and of the tax; the lines are drawn through `edges/rho` and `edges/target`. The event
    `trial` is written as a table and, when the run ends, as the hyperparameters of its outcome.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, purge_step: int | None = None, about: Mapping[str, Any] | None = None
    ) -> None:
        # Imported here: it brings torch with it, and 0.2 s, which only runs that write events should pay.
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(os.fspath(folder), purge_step=purge_step)
        self._tax: dict[str, float] = {}
        self._trial: Mapping[str, Any] = {}
        self._edges, charts = _charts(about or {})
        if charts:
            self._writer.add_custom_scalars({"cockpit": charts})

    def write(self, record: Record) -> None:
        match record:
            case Reading():
                self._write_reading(record)
            case Metrics(values=values, source=source):
                group = "metrics" if source == "evaluation" else "user"
                self._write_scalars(group, values, record.step)
                if source == "evaluation":
                    self._write_scalars("tax", self._tax, record.step)
                    self._write_scalars("edges", self._edges, record.step)
                    self._writer.flush()
            case Event(name="trial", detail=detail):
                self._trial = detail
                self._writer.add_text("trial", _table(detail), record.step)
            case Event(name=name, detail=detail):
                self._write_text(name, detail, record.step)
            case Outcome(status=status, reason=reason):
                self._write_text("outcome", {"status": status, "reason": reason}, record.step)
                if self._trial:
                    self._write_hyperparameters(record)

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

    def _write_hyperparameters(self, outcome: Outcome) -> None:
        """Into the same event file: the writer's own add_hparams would open a second run in a sub-folder."""
        from torch.utils.tensorboard.summary import hparams

        plain = {key: value for key, value in _flat(self._trial) if isinstance(value, str | float | int | bool)}
        found = {"hit_step": outcome.hit_step, "hit_seconds": outcome.hit_seconds, "best": outcome.best}
        results = {f"outcome/{name}": float(value) for name, value in found.items() if value is not None}
        for summary in hparams({**plain, "outcome": outcome.status}, results):  # type: ignore[no-untyped-call]
            self._writer.file_writer.add_summary(summary)
        self._write_scalars("outcome", {name.removeprefix("outcome/"): v for name, v in results.items()}, outcome.step)

    def _write_text(self, name: str, detail: Mapping[str, Any], step: int) -> None:
        self._writer.add_text(f"events/{name}", _json(detail), step)

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


def _charts(about: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """Constant lines by name, and the layout of the custom-scalar tab."""
    edges: dict[str, float] = {}
    charts: dict[str, Any] = {}
    rho = "curvature/preconditioned_sharpness"
    if rho in about.get("instruments", {}):
        edges["rho"] = 1.0
        charts["rho and its edge"] = ["Multiline", [f"{rho}/rho$", "edges/rho"]]
    target = about.get("target")
    if target:
        edges["target"] = float(target["value"])
        charts[f"{target['metric']} and its target"] = ["Multiline", [f"metrics/{target['metric']}$", "edges/target"]]
    if about.get("instruments"):
        charts["seconds of observation by instrument"] = ["Multiline", ["tax/.*"]]
    return edges, charts


def _flat(detail: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings with dotted names."""
    for name, value in detail.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _table(detail: Mapping[str, Any]) -> str:
    """A Markdown table, which TensorBoard renders."""
    rows = [f"| {name} | {value} |" for name, value in _flat(detail)]
    return "\n".join(["| setting | value |", "|---|---|", *rows])


def _json(detail: Mapping[str, Any]) -> str:
    """A user's event may hold anything: what has no spelling is written as its text."""
    try:
        return json.dumps(spell(detail))
    except TypeError:
        return json.dumps(detail, default=str)
