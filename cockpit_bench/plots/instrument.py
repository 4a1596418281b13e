"""Everything one instrument read in a run: one axis an output, drawn by its kind."""

import math
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cockpit_bench.plots import curves, distributions, grids, layers
from cockpit_bench.plots.style import BLUE, INK, NOTE_SIZE, TEXT_SIZE, legend, log_ticks, nothing, prepare
from cockpit_bench.runlog import Readings, Run, Series

PANE = (6.5, 3.6)  # inches an axis
DPI = 100
KEYS_WIDTH = 80  # characters over an axis
LINES = ("scalar", "per-group", "per-layer", "per-module")  # kinds that are curves over the steps
DECADES = 2.0  # a positive output that spans more gets a logarithmic axis


def instrument_figure(run: Run, label: str) -> Figure:
    """A picture of one instrument of a run, for any instrument, third-party ones included.

    The log's header says of what kind each output is: a scalar is a curve with its standard error, a per-group,
    per-layer or per-module output a line an entry, a histogram a heat map over the steps, a spectrum the density and a
    grid the counts of its last reading. Outputs of a log without declarations are drawn by their shape. Raises KeyError
    with the nearest labels for one that the run does not have. The size follows from the number of outputs; pyplot is
    not touched.
    """
    readings = run[label]
    declared = run.declared(label)
    names = [*(name for name in declared if name in readings), *(name for name in readings if name not in declared)]
    columns = min(3, max(1, math.ceil(math.sqrt(len(names)))))
    rows = max(1, math.ceil(len(names) / columns))
    figure = Figure(figsize=(PANE[0] * columns, PANE[1] * rows + 0.5), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[len(names) :]:
        ax.axis("off")
    for ax, name in zip(axes, names, strict=False):
        _draw(ax, run, readings, name, declared.get(name, {}))
    if not names:
        axes[0].axis("on")
        last = readings.readings[-1]
        prepare(axes[0], label)
        nothing(axes[0], f"nothing was read; last {last.status}:\n" + textwrap.fill(last.reason[:300], 60))
    figure.suptitle(f"{label}, {_counts(run, label)}; {run.folder.name}", x=0.01, ha="left", fontsize=12, color=INK)
    return figure


def _counts(run: Run, label: str) -> str:
    statuses = [reading.status for reading in run[label].readings]
    return ", ".join(f"{statuses.count(name)} {name}" for name in dict.fromkeys(statuses))


def _draw(ax: Any, run: Run, readings: Readings, name: str, declared: Mapping[str, Any]) -> None:
    """One output; it says so when no value of it can be drawn."""
    series = readings[name]
    kind = declared.get("kind") or _kind_of(series)
    unit = str(declared.get("unit", ""))
    meaning = textwrap.shorten(str(declared.get("meaning", "")), KEYS_WIDTH, placeholder=" ...")
    log = _wide(series) if kind in LINES else False
    prepare(ax, name, "" if unit == "1" or kind == "spectrum" else unit, log=log)
    ax.set_xlabel(f"eigenvalue, {unit}" if kind == "spectrum" else "optimizer step", fontsize=TEXT_SIZE, color=INK)
    if kind in LINES:
        _over(ax, series)
    if not _by_kind(ax, run, readings, name, kind, meaning or name, positive=log):
        nothing(ax, f"{name}: no value that can be drawn as {kind}")
        return
    edge = declared.get("edge")
    if edge is not None and not (log and edge <= 0):
        curves.edge(ax, float(edge), f"edge: {edge:g}")
    if kind == "scalar" and not log:
        curves.limit(ax, [np.asarray(series.values)], edge)
    if kind != "scalar":
        ax.set_title(meaning, loc="right", fontsize=NOTE_SIZE, color=INK)
    if kind in LINES or kind == "histogram":
        log_ticks(ax)
    legend(ax, width=KEYS_WIDTH)


def _by_kind(ax: Any, run: Run, readings: Readings, name: str, kind: str, meaning: str, *, positive: bool) -> bool:
    series = readings[name]
    match kind:
        case "scalar":
            doubt = ", ± standard error" if np.isfinite(series.stderr).any() else ""
            return curves.scalar(ax, series, BLUE, meaning + doubt, positive=positive)
        case "per-layer":
            return layers.lines(ax, series, layers.names_in(run), positive=positive)
        case "per-module":
            return layers.lines(ax, *layers.by_module(series, readings.readings), positive=positive)
        case "per-group":
            count = layers.stacked(series)[1].shape[1]
            return layers.lines(ax, series, [f"group {index}" for index in range(count)], positive=positive)
        case "histogram":
            return distributions.histogram(ax, series)
        case "spectrum":
            return distributions.spectrum(ax, series)
        case "grid":
            marginals = {other: readings[other] for other in readings if other != name}
            return grids.grid(ax, series, marginals)
    return False


def _over(ax: Any, series: Series) -> None:
    """All steps at which a reading was due, those that only have a mark included."""
    first, last = int(series.steps[0]), int(series.steps[-1])
    margin = 0.03 * (last - first) or 0.5
    ax.set_xlim(first - margin, last + margin)


def _kind_of(series: Series) -> str:
    """What the values look like where nothing was declared."""
    if not isinstance(series.values, list):
        return "scalar"
    ranks = {np.ndim(value) for value in series.values if value is not None}
    return "per-group" if ranks == {1} else "an array of unknown kind"


def _wide(series: Series) -> bool:
    """All values positive, and over more than `DECADES`."""
    values = layers.stacked(series)[1] if isinstance(series.values, list) else np.asarray(series.values)
    finite = values[np.isfinite(values)]
    return bool(len(finite)) and finite.min() > 0 and math.log10(finite.max() / finite.min()) > DECADES
