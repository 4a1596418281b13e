"""Records as TensorBoard scalars and histograms with grouped tags; the log stays the truth, this is a view of it.

Shapes: L = layers, modules or parameter groups, K = bins.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cockpit_bench.runlog import Event, Metrics, Outcome, Reading, Record
from cockpit_bench.runlog.codec import spell
from cockpit_bench.runlog.modules import names_of
from cockpit_bench.sinks.sink import Sink

LONGEST_VECTOR = 8  # of a value that no instrument declared
MOST_ENTRIES = 40  # layers, modules or parameter groups that get a tag each
RHO, SHARPNESS = "curvature/preconditioned_sharpness", "curvature/sharpness"
Floats = npt.NDArray[np.float64]
Point = tuple[str, float]  # tag, number


class TensorBoardSink(Sink):
    """Writes one event file. Tags:

    `<instrument>/<output>` and `<instrument>/<output>_stderr`; `<instrument>/<output>/<layer>` for each layer, by the
    names in the event `layers`, `<instrument>/<output>/<module>` for each module that a reading names, and
    `<instrument>/<output>/<index>` for each parameter group. An output with more than `most_entries` of them is sent as
    `/min`, `/median` and `/max` over those that are not NaN, and a text says so, once. A histogram is sent as it was
    binned; spectra and grids are left to the log. An output that is not declared is sent as a scalar, or `/0`, `/1` for
    a vector of at most 8 entries.

    `metrics/<name>` for evaluations, `user/<name>` for the user's own scalars, `events/<name>` as text, and with every
    evaluation `tax/<instrument>`, the seconds that the instrument has taken so far. `purge_step` hides the points that
    earlier event files of a resumed run have at that step or later.

    `about` is what the log's header says of the run: it declares the kinds of the outputs, and the custom-scalar tab
    gets charts of rho with its edge, of the sharpness with its own, of the metric with its target, of the layers
    together, and of the tax; fixed lines are drawn through `edges/rho` and `edges/target`. The event `trial` is written
    as a table and, when the run ends, as the hyperparameters of its outcome.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        purge_step: int | None = None,
        about: Mapping[str, Any] | None = None,
        most_entries: int = MOST_ENTRIES,
    ) -> None:
        # Imported here: it brings torch with it, and 0.2 s, which only runs that write events should pay.
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(os.fspath(folder), purge_step=purge_step)
        self._tax: dict[str, float] = {}
        self._trial: Mapping[str, Any] = {}
        self._kinds = {(label, name): str(kind) for label, name, kind in _declared(about or {})}
        self._layers: list[str] = []
        self._most_entries, self._shortened = most_entries, False
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
                if name == "layers":
                    self._layers = [str(layer) for layer in detail.get("names", ())]
                self._write_text(name, detail, record.step)
            case Outcome(status=status, reason=reason):
                self._write_text("outcome", {"status": status, "reason": reason}, record.step)
                if self._trial:
                    self._write_hyperparameters(record)

    def _write_reading(self, reading: Reading) -> None:
        if reading.status == "ok":
            points: list[Point] = []
            for name, value in reading.values.items():
                if (reading.instrument, name) == (SHARPNESS, "edge") and np.isnan(value):
                    continue  # this optimizer has no edge; TensorBoard would draw NaN at 0
                kind = self._kinds.get((reading.instrument, name), "undeclared")
                points += self._points_of(reading, name, kind, value)
            points += [(f"{reading.instrument}/{name}_stderr", doubt) for name, doubt in reading.stderr.items()]
            self._send(points, reading.step)
        if "seconds" in reading.cost:
            self._tax[reading.instrument] = self._tax.get(reading.instrument, 0.0) + reading.cost["seconds"]

    def _points_of(self, reading: Reading, name: str, kind: str, value: Any) -> Iterable[Point]:
        """One output in the form of its kind; what does not have the shape of its kind is left to the log."""
        tag, step = f"{reading.instrument}/{name}", reading.step
        match kind:
            case "histogram":
                table = _numbers(value)
                if table is not None and table.ndim == 2 and table.shape[0] == 2 and table[1].sum() > 0:
                    self._writer.add_histogram_raw(tag, global_step=step, **binned(*table))
                return []
            case "per-layer" | "per-module" | "per-group":
                entries = _numbers(value)
                if entries is None or entries.ndim != 1:
                    return []
                return self._entries(tag, entries, self._names(reading, kind, len(entries)), step)
            case "spectrum" | "grid":
                return []
        return _points(tag, value)

    def _names(self, reading: Reading, kind: str, count: int) -> list[str]:
        """What the entries of an output are called; numbers where names are not known or do not fit."""
        if kind == "per-module":
            return names_of(reading, count)
        named = kind == "per-layer" and len(self._layers) == count
        return self._layers if named else [str(index) for index in range(count)]

    def _entries(self, tag: str, values_L: Floats, names: Sequence[str], step: int) -> Iterable[Point]:
        """Every entry under its name, or their extremes and median where there are too many."""
        if len(values_L) > self._most_entries:
            self._say_shortened(tag, len(values_L), step)
            known = values_L[~np.isnan(values_L)]
            some = known if len(known) else np.array([np.nan])
            return [(f"{tag}/min", some.min()), (f"{tag}/median", np.median(some)), (f"{tag}/max", some.max())]
        return [(f"{tag}/{name}", number) for name, number in zip(names, values_L, strict=True)]

    def _send(self, points: Sequence[Point], step: int) -> None:
        """All scalars of a record as one event: many layers would otherwise cost many."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=float(number)) for tag, number in points]
        if values:
            self._writer.file_writer.add_summary(Summary(value=values), step)

    def _say_shortened(self, tag: str, count: int, step: int) -> None:
        if not self._shortened:
            self._shortened = True
            text = (
                f"`{tag}` has {count} entries, more than the {self._most_entries} that get a tag each: it and others "
                "like it are sent as min, median and max. The log has every entry."
            )
            self._writer.add_text("notes/entries", text, step)

    def _write_scalars(self, group: str, values: Mapping[str, Any], step: int) -> None:
        self._send([point for name, value in values.items() for point in _points(f"{group}/{name}", value)], step)

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


def binned(limits_K: Floats, counts_K: Floats) -> dict[str, Any]:
    """The arguments of `add_histogram_raw` for K bins given by ascending upper limits.

    An open end is taken as wide as the bin beside it. `min` and `max` are the outer limits of the bins that are not
    empty, as TensorBoard needs them; sums are those of the middles of the bins.
    """
    closed = limits_K[np.isfinite(limits_K)]
    widths = np.diff(closed) if len(closed) > 1 else np.ones(1)
    start = closed if len(closed) else np.zeros(1)
    edges = np.concatenate([[start[0] - widths[0]], start, start[-1:] + widths[-1]])[: len(limits_K) + 1]
    filled = np.flatnonzero(counts_K > 0)
    middles = (edges[1:] + edges[:-1]) / 2
    return {
        "min": float(edges[filled[0]]),
        "max": float(edges[filled[-1] + 1]),
        "num": float(counts_K.sum()),
        "sum": float(counts_K @ middles),
        "sum_squares": float(counts_K @ middles**2),
        "bucket_limits": edges[1:].tolist(),
        "bucket_counts": counts_K.tolist(),
    }


def _points(tag: str, value: Any) -> Iterator[Point]:
    """A scalar as itself, a short vector entry by entry, anything else not at all."""
    numbers = _numbers(value)
    if numbers is not None and numbers.ndim == 0:
        yield tag, float(numbers)
    elif numbers is not None and numbers.ndim == 1 and len(numbers) <= LONGEST_VECTOR:
        for index, entry in enumerate(numbers):
            yield f"{tag}/{index}", float(entry)


def _numbers(value: Any) -> Floats | None:
    """An array of any rank, or None for what is none: text, a ragged list."""
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        return None


def _declared(about: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(label, output, kind) of every output that the instruments of the run declare."""
    for label, facts in about.get("instruments", {}).items():
        for name, output in facts.get("outputs", {}).items():
            yield label, name, output.get("kind", "scalar")


def _charts(about: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """Constant lines by name, and the layout of the custom-scalar tab."""
    edges: dict[str, float] = {}
    charts: dict[str, Any] = {}
    if RHO in about.get("instruments", {}):
        edges["rho"] = 1.0
        charts["rho and its edge"] = ["Multiline", [f"{RHO}/rho$", "edges/rho"]]
    outputs = list(_declared(about))
    if any(output[:2] == (SHARPNESS, "edge") for output in outputs):
        charts["sharpness and its edge"] = ["Multiline", [f"{SHARPNESS}/sharpness$", f"{SHARPNESS}/edge$"]]
    target = about.get("target")
    if target:
        edges["target"] = float(target["value"])
        charts[f"{target['metric']} and its target"] = ["Multiline", [f"metrics/{target['metric']}$", "edges/target"]]
    for label, name, kind in outputs:
        if kind in ("per-layer", "per-module"):
            charts[f"{label}/{name}"] = ["Multiline", [f"{label}/{name}/.*"]]
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
