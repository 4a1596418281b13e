"""Histograms over steps as a heat map, and the spectrum of a reading as a density.

Shapes: S = readings, K = bins of a histogram or points of a spectrum's grid.
"""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from matplotlib.colors import LogNorm
from matplotlib.ticker import FixedLocator

from cockpit_bench.plots.curves import Floats, mark_missing
from cockpit_bench.plots.style import BLUE, FAINT, INK, TEXT_SIZE
from cockpit_bench.runlog import Series

COLOURS = "viridis"  # dark to light, read alike by the colour-blind
DEEPEST = 1e-8  # of the highest density: what is below is not drawn
TICKS = 5  # at most, to each side of zero on an axis that is logarithmic to both
MIDDLE = 0.5  # decades that half of the linear middle of such an axis takes
EVEN = 10.0  # bins whose widths differ by less than this factor are drawn on a linear axis


def histogram(ax: Any, series: Series) -> bool:
    """Counts by step and bin, the colour logarithmic; False when there is nothing to draw.

    A reading is an array of shape (2, K): the ascending upper limits of K bins, of which the first counts everything at
    or below its limit and the last may be infinite, and the counts. Open bins are drawn as wide as their neighbours. A
    reading reaches half way to its neighbours in time, so one that is missing leaves a gap. Bins may change on the way.
    """
    tables = [_table(value) for value in series.values]
    drawn = np.array([table is not None and bool((table[1] > 0).any()) for table in tables], dtype=bool)
    mark_missing(ax, series, series.steps[(series.status == "ok") & ~drawn])
    if not drawn.any():
        return False
    bins = [tuple(table[0]) if table is not None and one else None for table, one in zip(tables, drawn, strict=True)]
    counts = [table[1] if table is not None else np.zeros(0) for table in tables]
    log = set_scale(ax, "y", [np.array(limits) for limits in dict.fromkeys(bins) if limits is not None]) == "log"
    norm = LogNorm(1, max(2.0, *(float(counts[at].max()) for at in np.flatnonzero(drawn))))
    times = _halfway(series.steps)
    mesh = None
    for limits, group in groupby(range(len(bins)), key=lambda at: bins[at]):
        where = list(group)
        if limits is not None:
            counts_KS = np.ma.masked_less_equal(np.stack([counts[at] for at in where], axis=1), 0)
            across = times[where[0] : where[-1] + 2]
            edges = closed(np.array(limits), log=log)
            mesh = ax.pcolormesh(across, edges, counts_KS, norm=norm, cmap=COLOURS)
    colour_bar(ax, mesh)
    return True


def colour_bar(ax: Any, mesh: Any) -> None:
    """What the colours of a heat map of counts mean."""
    bar = ax.figure.colorbar(mesh, ax=ax, pad=0.02)
    bar.set_label("count", fontsize=TEXT_SIZE, color=INK)
    bar.ax.tick_params(labelsize=TEXT_SIZE, colors=INK)


def spectrum(ax: Any, series: Series) -> bool:
    """Density over eigenvalues on a logarithmic axis: the last reading, and the first one faint to hold it against.

    A reading is an array of shape (2, K): the grid and the density on it. False when no density is positive.
    """
    tables = [(step, _table(value)) for step, value in zip(series.steps, series.values, strict=True)]
    shown = [(step, table) for step, table in tables if table is not None and (table[1] > 0).any()]
    if not shown:
        return False
    lines = [(*shown[-1], BLUE)] if len(shown) == 1 else [(*shown[0], FAINT), (*shown[-1], BLUE)]
    floor = DEEPEST * max(float(np.nanmax(density_K)) for _, (_, density_K), _ in lines)
    for step, (grid_K, density_K), colour in lines:
        ax.plot(
            grid_K, np.where(density_K > floor, density_K, np.nan), color=colour, linewidth=1.3, label=f"step {step}"
        )
    ax.set_yscale("log")
    return True


def closed(limits_K: Floats, *, log: bool = False) -> Floats:
    """The K + 1 edges of K bins given by upper limits: the open ends get the width of the bin beside them, or 1."""
    inner = limits_K[np.isfinite(limits_K)]
    place = np.log(inner) if log else inner
    if not len(place):
        return np.array([-0.5, 0.5])
    widths = np.diff(place) if len(place) > 1 else np.ones(1)
    last = [place[-1] + widths[-1]] if len(inner) < len(limits_K) else []
    edges = np.concatenate([[place[0] - widths[0]], place, last])
    return np.exp(edges) if log else edges


def set_scale(ax: Any, which: Literal["x", "y"], every_limits: Sequence[Floats]) -> str:
    """Linear for bins of about equal width, else logarithmic, to both sides of zero where there are negative limits."""
    axis, scale = (ax.xaxis, ax.set_xscale) if which == "x" else (ax.yaxis, ax.set_yscale)
    inner = [limits[np.isfinite(limits)] for limits in every_limits]
    widths = [np.diff(limits) for limits in inner if len(limits) > 2]
    if all(width.max() <= EVEN * width.min() for width in widths):
        return "linear"
    limits = np.unique(np.concatenate(inner))
    if limits[0] > 0:
        scale("log")
        return "log"
    sizes = np.abs(limits[limits != 0])
    scale("symlog", linthresh=float(sizes.min()), linscale=MIDDLE)
    low, high = math.ceil(math.log10(sizes.min())), math.floor(math.log10(sizes.max()))
    stride = max(1, math.ceil((high - low + 1) / TICKS))
    powers = 10.0 ** np.array([n for n in range(high, low - 1, -stride) if n + 1 - low > stride / 2])  # clear of zero
    axis.set_major_locator(FixedLocator([*-powers, 0.0, *powers[::-1]]))
    return "symlog"


def _table(value: Any) -> Floats | None:
    """The two rows of a reading, or None where it has none."""
    table = None if value is None else np.asarray(value, dtype=np.float64)
    return table if table is not None and table.ndim == 2 and table.shape[0] == 2 and table.shape[1] else None


def _halfway(steps_S: npt.NDArray[np.int64]) -> Floats:
    """S + 1 edges between S readings in time."""
    if len(steps_S) == 1:
        return np.array([steps_S[0] - 0.5, steps_S[0] + 0.5])
    middle = (steps_S[1:] + steps_S[:-1]) / 2
    return np.concatenate([[2 * steps_S[0] - middle[0]], middle, [2 * steps_S[-1] - middle[-1]]])
