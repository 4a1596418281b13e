"""Runs side by side in one picture: the metric on both clocks, and rho, one colour a group."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cockpit_bench.bench.comparison import Group
from cockpit_bench.plots.curves import edge
from cockpit_bench.plots.panel import DPI, WIDTH
from cockpit_bench.plots.style import CYCLE, legend, log_ticks, nothing, prepare
from cockpit_bench.runlog import Run, Series

KEYS_WIDTH = 80  # characters over an axis
RHO = "curvature/preconditioned_sharpness"


def comparison(runs: Sequence[Run], groups: Sequence[Group]) -> Figure:
    """The figure, 1600 x 550 pixels; every seed is a line, groups are told apart by colour and named once."""
    figure = Figure(figsize=(WIDTH, 5.5), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    by_steps, by_seconds, rho = figure.subplots(1, 3)
    metric, target = _target(runs)
    prepare(by_steps, f"{metric} by steps")
    prepare(by_seconds, f"{metric} by training time")
    prepare(rho, "ρ: sharpness as the optimizer sees it")
    by_folder = {run.folder.name: run for run in runs}
    for index, group in enumerate(groups):
        colour = CYCLE[index % len(CYCLE)]
        for number, entry in enumerate(group.entries):
            run, label = by_folder[entry.folder], group.name if number == 0 else "_" + group.name
            if metric in run.metrics:
                series = run.metrics[metric]
                _line(by_steps, series.steps, series, colour, label)
                _line(by_seconds, series.seconds, series, colour, label)
            if RHO in run and "rho" in run[RHO]:
                _line(rho, run[RHO]["rho"].steps, run[RHO]["rho"], colour, label)
    _finish(by_steps, by_seconds, rho, target)
    return figure


def _target(runs: Sequence[Run]) -> tuple[str, float | None]:
    for run in runs:
        target = (run.header.extra.get("target") if run.header else None) or {}
        if target:
            return str(target["metric"]), float(target["value"])
    names = [name for run in runs for name in run.metrics]
    return (names[0] if names else "metric"), None


def _line(ax: Any, x: Any, series: Series, colour: str, label: str) -> None:
    values = np.asarray(series.values, dtype=np.float64)
    ax.plot(x, np.where(np.isfinite(values), values, np.nan), color=colour, linewidth=1.3, label=label)


def _finish(by_steps: Any, by_seconds: Any, rho: Any, target: float | None) -> None:
    for ax, label in ((by_steps, "optimizer step"), (by_seconds, "seconds of training"), (rho, "optimizer step")):
        if not ax.lines:
            nothing(ax, "nothing was read")
            continue
        ax.set_xlabel(label, fontsize=9)
        if ax is rho:
            if any((np.asarray(line.get_ydata()) > 0).any() for line in ax.lines):
                ax.set_yscale("log")
            edge(ax, 1.0, "edge of stability")
        elif target is not None:
            edge(ax, target, "target")
        log_ticks(ax)
        legend(ax, width=KEYS_WIDTH)
