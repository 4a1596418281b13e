"""A joint histogram as a heat map with its marginals.

Shapes: R = bins of the axis that goes up, C = bins of the axis that goes across.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm

from cockpit_bench.plots.curves import Floats
from cockpit_bench.plots.distributions import COLOURS, closed, colour_bar, set_scale
from cockpit_bench.plots.style import BLUE, FAINT, INK, TEXT_SIZE
from cockpit_bench.runlog import Series

MARGINAL, GAP = 0.16, 0.02  # of the axis: height of the one above, width of the one at the right, space between


def grid(ax: Any, series: Series, marginals: Mapping[str, Series]) -> bool:
    """The last reading that has counts: colours are logarithmic, axes follow the limits; False when there is none.

    A reading is an array of shape (R + 1, C + 1): [0, 1:] and [1:, 0] are the ascending upper limits of columns and
    rows, [1:, 1:] the counts; open bins are drawn as wide as their neighbours. Sums over rows and columns stand above
    and at the right. Fine lines cross at zero where the axes reach to both sides of it. An axis is called after the
    histogram in `marginals` that has its limits.
    """
    tables = [_table(value) for value in series.values]
    last = next((at for at in reversed(range(len(tables))) if tables[at] is not None), None)
    table = None if last is None else tables[last]
    if last is None or table is None:
        return False
    counts_RC, limits = table[1:, 1:], (table[0, 1:], table[1:, 0])
    across = closed(limits[0], log=set_scale(ax, "x", limits[:1]) == "log")
    up = closed(limits[1], log=set_scale(ax, "y", limits[1:]) == "log")
    shown_RC = np.ma.masked_less_equal(counts_RC, 0)
    mesh = ax.pcolormesh(across, up, shown_RC, norm=LogNorm(1, max(2.0, float(counts_RC.max()))), cmap=COLOURS)
    _zero_lines(ax, across, up)
    _marginals(ax, counts_RC, across, up)
    colour_bar(ax, mesh)
    names = [_called(of_axis, marginals, last) for of_axis in limits]
    ax.set_xlabel(names[0] or "across", fontsize=TEXT_SIZE, color=INK)
    ax.set_ylabel(names[1] or "up", fontsize=TEXT_SIZE, color=INK)
    ax.text(1 + GAP, 1 + GAP, f"step {series.steps[last]}", transform=ax.transAxes, fontsize=TEXT_SIZE, color=INK)
    return True


def _marginals(ax: Any, counts_RC: Floats, across: Floats, up: Floats) -> None:
    above = ax.inset_axes((0, 1 + GAP, 1, MARGINAL), sharex=ax)
    above.stairs(counts_RC.sum(0), across, fill=True, color=BLUE)
    right = ax.inset_axes((1 + GAP, 0, MARGINAL / 2, 1), sharey=ax)
    right.stairs(counts_RC.sum(1), up, fill=True, color=BLUE, orientation="horizontal")
    above.axis("off")
    right.axis("off")


def _called(limits: Floats, marginals: Mapping[str, Series], at: int) -> str:
    """The output that counts in the same bins at that reading."""
    for name, series in marginals.items():
        value = series.values[at]
        if np.ndim(value) == 2 and np.array_equal(np.asarray(value)[0], limits):
            return name
    return ""


def _zero_lines(ax: Any, across: Floats, up: Floats) -> None:
    if across[0] < 0 < across[-1]:
        ax.axvline(0, color=FAINT, linewidth=0.6)
    if up[0] < 0 < up[-1]:
        ax.axhline(0, color=FAINT, linewidth=0.6)


def _table(value: Any) -> Floats | None:
    """A grid with at least one count, or None."""
    table = None if value is None else np.asarray(value, dtype=np.float64)
    fits = table is not None and table.ndim == 2 and min(table.shape) > 1 and bool((table[1:, 1:] > 0).any())
    return table if fits else None
