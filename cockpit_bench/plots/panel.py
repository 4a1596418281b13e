"""The picture of a run: did it get there, how did the loss go, and what do step, gradient and curvature say."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from statistics import mode
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from cockpit_bench.plots import curves, layers
from cockpit_bench.plots.box import Box
from cockpit_bench.plots.buckets import buckets, spent
from cockpit_bench.plots.panes import PANES, PROGRESS, Pane
from cockpit_bench.plots.style import CYCLE, GREEN, INK, SHADE, TEXT_SIZE, legend, log_ticks, nothing, prepare
from cockpit_bench.runlog import Run, Series
from cockpit_bench.runlog.page import headline
from cockpit_bench.tables import share

WIDTH, HEIGHT, DPI = 16.0, 10.0, 100  # 1600 x 1000 pixels
ACROSS = 3  # panes in a row

# The layout, in pixels. Fixed, so that one step stands at one place in every row, whatever the numbers at the axes.
STRIP = Box(10, 18, 20, 938)  # labels of the rows
PANES_BOX = Box(32, 18, 1210, 938)
CLOCK = Box(1368, 340, 220, 560)
KEY = Box(1258, 18, 330, 230)
LEFT, RIGHT, ABOVE, BELOW = 64, 28, 58, 22  # round an axis: tick labels, second scale, title and keys, tick labels
KEY_WIDTH, NAME_WIDTH = 58, 18  # characters of the key's lines and of a metric's name

Draw = Callable[[Any, Run], None]
Row = tuple[str, list[Draw]]


def panel(run: Run) -> Figure:
    """The figure, 1600 x 1000 pixels at its own resolution; not attached to pyplot, so no global state is touched.

    A row of panes for progress, step, gradient and curvature each, the clock at the right. Instruments that the log
    does not have get no pane: they are listed under the clock, and what is there has the room.
    """
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI)
    FigureCanvasAgg(figure)
    rows = arrange(run)
    drawn = [ax for index, row in enumerate(rows) for ax in _draw_row(figure, row, run, index, len(rows))]
    last = max((record.step for record in run.records), default=0)
    for ax in drawn:
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.set_xlim(-0.01 * max(last, 1), max(last, 1) * 1.01)
    for ax in drawn[-len(rows[-1][1]) :]:
        ax.set_xlabel("optimizer step", fontsize=TEXT_SIZE, color=INK)
    clock(CLOCK.axes(figure), run)
    key(KEY.axes(figure), run, curves.marks_in(drawn))
    figure.suptitle(headline(run) + _on_top(run), x=0.006, y=0.985, ha="left", fontsize=13, color=INK)
    return figure


def arrange(run: Run) -> list[Row]:
    """Rows from top to bottom: a group of panes each; neighbours that fit into one row share it."""
    groups: dict[str, list[Draw]] = {PROGRESS: [metric]}
    for pane in PANES:
        if pane.instrument in run or pane.instrument == "batch/loss":
            groups.setdefault(pane.group, []).append(_drawer(pane))
    rows: list[Row] = []
    for name, draws in groups.items():
        if rows and len(rows[-1][1]) + len(draws) <= ACROSS:
            rows[-1] = (f"{rows[-1][0]} · {name}", [*rows[-1][1], *draws])
        else:
            rows.append((name, draws))
    return rows


def _drawer(pane: Pane) -> Draw:
    return lambda ax, run: draw(ax, run, pane)


def _draw_row(figure: Figure, row: Row, run: Run, index: int, count: int) -> list[Any]:
    """The label and the panes of one row, which share its width."""
    name, draws = row
    strip = STRIP.part(0, 1, index, count).inside(0, 0, 4, 4).axes(figure)
    strip.set(xticks=[], yticks=[], facecolor=SHADE)
    strip.spines[:].set_visible(False)
    strip.text(0.5, 0.5, name, rotation=90, ha="center", va="center", fontsize=10, color=INK, fontweight="bold")
    axes = []
    for at, function in enumerate(draws):
        box = PANES_BOX.part(at, len(draws), index, count)
        axes.append(box.inside(LEFT, RIGHT, ABOVE, BELOW).axes(figure))
        function(axes[-1], run)
    return axes


def _on_top(run: Run) -> str:
    """What observing a run that has ended took, the log included, as a share of its training time."""
    outcome = run.outcome
    if outcome is None:
        return ""
    spent = sum(outcome.buckets.get(name, 0.0) for name in ("observe", "log"))
    return f", observation {share(spent, outcome.seconds)} on top"


def metric(ax: Any, run: Run) -> None:
    """Evaluated metrics; where there is a target its own metric alone, the target as a line, the hit as a mark."""
    target = (run.header.extra.get("target") if run.header else None) or {}
    names = [target["metric"]] if target.get("metric") in run.metrics else list(run.metrics)[:4]
    prepare(ax, "Metric and target" if target else "Metrics")
    for name, colour in zip(names, CYCLE, strict=False):
        curves.scalar(ax, run.metrics[name], colour, name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 1] + "…")
    if not names:
        nothing(ax, "nothing was evaluated")
        return
    if target:
        sign = "≥" if target["direction"] == "at_least" else "≤"
        curves.edge(ax, float(target["value"]), f"target {sign} {target['value']:g}")
    outcome = run.outcome
    hit = next((e.step for e in run.events if e.name == "target_hit"), None)
    if hit is not None:
        seconds = f", {outcome.hit_seconds:.3g} s" if outcome is not None and outcome.hit_seconds is not None else ""
        ax.axvline(hit, color=GREEN, linewidth=1.2, label=f"hit: step {hit}{seconds}")
    legend(ax)


def draw(ax: Any, run: Run, pane: Pane) -> None:
    """One pane; it says why when it has nothing to show."""
    readings: Mapping[str, Series] = run.get(pane.instrument, {})
    found = {output: readings[output] for output in pane.curves if output in readings}
    log = pane.log and any((np.asarray(series.values) > 0).any() for series in found.values())
    declared = run.unit(pane.instrument, next(iter(pane.curves)))
    prepare(ax, pane.title, declared if pane.unit is None else pane.unit, log=log)
    drawn = [
        _curve(ax, series, colour, pane.curves[output], noisy=pane.noisy, positive=log)
        for (output, series), colour in zip(found.items(), CYCLE, strict=False)
    ]
    if not any(drawn):
        nothing(ax, why_empty(run, pane.instrument, found))
        return
    if pane.layers is not None and pane.layers[0] in readings:
        layers.spread(ax, readings[pane.layers[0]], CYCLE[0], pane.layers[1], positive=log)
    _edges(ax, run, pane)
    if not log and not any(isinstance(series.values, list) for series in found.values()):
        columns = [np.asarray(series.values) for series in found.values()]
        curves.limit(ax, columns, None if pane.edge is None else pane.edge[0])
    if pane.second:
        _second_scale(ax, pane.second)
    log_ticks(ax)
    legend(ax)


def _curve(ax: Any, series: Series, colour: str, label: str, *, noisy: bool, positive: bool) -> bool:
    if isinstance(series.values, list):
        count = layers.stacked(series)[1].shape[1]
        return layers.lines(ax, series, [label] if count == 1 else [f"group {index}" for index in range(count)])
    return (curves.smooth if noisy else curves.scalar)(ax, series, colour, label, positive=positive)


def _edges(ax: Any, run: Run, pane: Pane) -> None:
    """What the curves are held against: a fixed value, an output, the batch size."""
    readings = run[pane.instrument]
    if pane.edge is not None:
        curves.edge(ax, *pane.edge)
    if pane.moving_edge is not None and pane.moving_edge[0] in readings:
        curves.moving_edge(ax, readings[pane.moving_edge[0]], pane.moving_edge[1])
    sizes = [size for r in readings.readings if isinstance(size := r.provenance.get("examples"), int)]
    if pane.batch and sizes:
        curves.edge(ax, mode(sizes), f"batch: {mode(sizes)}")


def _second_scale(ax: Any, label: str) -> None:
    second = ax.secondary_yaxis("right", functions=(lambda y: 2 * y - 1, lambda y: (y + 1) / 2))
    second.tick_params(labelsize=TEXT_SIZE, colors=INK, pad=1)
    ax.plot([], [], linestyle="", label=f"right: {label}")


def why_empty(run: Run, label: str, found: Mapping[str, Series]) -> str:
    """The reason for an empty pane: not in the log, failed with a reason, or no finite value."""
    if label not in run:
        return f"{label} was not read"
    bad = [reading for reading in run[label].readings if reading.status != "ok"]
    if bad and not found:
        return f"{label} {bad[-1].status}:\n" + textwrap.fill(bad[-1].reason[:160], 40)
    return f"{label}: no finite value"


def clock(ax: Any, run: Run) -> None:
    """Buckets and tax; of a run that has not ended, or was killed, as far as the log goes."""
    prepare(ax, "Where the time went" if run.outcome is not None else "Time so far")
    buckets(ax, *spent(run))


def key(ax: Any, run: Run, marks: Sequence[str]) -> None:
    """What the marks mean, and which panes the log has nothing for."""
    ax.axis("off")
    missing = [pane.title.partition(":")[0] for pane in PANES if pane.instrument not in run]
    if missing:
        text = textwrap.fill("Not read in this run: " + ", ".join(missing) + ".", KEY_WIDTH)
        ax.text(0.0, 0.0, text, transform=ax.transAxes, va="bottom", fontsize=TEXT_SIZE, color=INK)
    if marks:
        kinds = [curves.MARKS[name] for name in marks]
        handles = [Line2D([], [], linestyle="", marker=marker, color=colour) for marker, colour, _ in kinds]
        ax.legend(
            handles, [meaning for *_, meaning in kinds], loc="upper left", bbox_to_anchor=(0.0, 1.0), frameon=False,
            fontsize=TEXT_SIZE, handletextpad=0.2, borderaxespad=0, borderpad=0, alignment="left",
            title="Marks at the foot of a pane", title_fontsize=TEXT_SIZE,
        )  # fmt: skip


def save(figure: Figure, path: Any) -> None:
    """Write a figure; the format follows from the ending (png, pdf, svg)."""
    figure.savefig(path, dpi=DPI)
