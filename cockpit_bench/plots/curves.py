"""Values over steps: gaps where they are not finite, bands of doubt, marks for what was not read."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cockpit_bench.plots.style import FAINT, INK, NOTE_SIZE, ORANGE, RED
from cockpit_bench.runlog import Series

MANY = 60  # points from which on a curve is drawn without markers
MARKS = {  # what was due and cannot be drawn: marker, colour, what the panel's key says
    "skipped": ("|", FAINT, "skipped: over the budget"),
    "failed": ("x", RED, "failed: the log has the reason"),
    "no finite value": ("v", ORANGE, "no value: NaN, infinite, or not positive on a log axis"),
}
Floats = npt.NDArray[np.float64]
Steps = npt.NDArray[np.int64]


def scalar(ax: Any, series: Series, colour: str, label: str, *, positive: bool = False) -> bool:
    """One output as a curve; False when no value of it can be drawn.

    Skipped and failed readings are left out of the curve; a value that is NaN, infinite or, on a logarithmic axis, not
    positive is a gap. A standard error is a band of one of them to each side.
    """
    values = np.asarray(series.values, dtype=np.float64)
    read = series.status == "ok"
    steps, values, stderr = series.steps[read], values[read], series.stderr[read]
    shown = drawable(values, positive=positive)
    mark_missing(ax, series, steps[~shown])
    if not shown.any():
        return False
    y = np.where(shown, values, np.nan)
    ax.plot(steps, y, color=colour, linewidth=1.4, label=label, **_marker(shown))
    _band(ax, steps, y, stderr, colour, positive=positive)
    return True


def _band(ax: Any, steps: Steps, y: Floats, stderr: Floats, colour: str, *, positive: bool) -> None:
    """One standard error to each side of a curve, where there is one; cut off below on a logarithmic axis."""
    certain = np.isfinite(stderr) & np.isfinite(y)
    if not certain.any():
        return
    low, high = (np.where(certain, edge, np.nan) for edge in (y - stderr, y + stderr))
    floor = np.nanmin(y) / 2 if positive else -np.inf
    ax.fill_between(steps, np.maximum(low, floor), high, color=colour, alpha=0.2, lw=0)


def smooth(ax: Any, series: Series, colour: str, label: str, *, positive: bool = False) -> bool:
    """A noisy curve: the values faint, and their running median over a fiftieth of the run on top.

    The band round the median is the standard error of one reading, as a running median too.
    """
    values = np.asarray(series.values, dtype=np.float64)
    width = int(np.count_nonzero(series.status == "ok")) // 50
    if width < 3:
        return scalar(ax, series, colour, label, positive=positive)
    read = series.status == "ok"
    steps, values, stderr = series.steps[read], values[read], series.stderr[read]
    shown = drawable(values, positive=positive)
    mark_missing(ax, series, steps[~shown])
    if not shown.any():
        return False
    y = np.where(shown, values, np.nan)
    middle = running_median(y, width)
    ax.plot(steps, y, color=colour, linewidth=0.6, alpha=0.35)
    ax.plot(steps, middle, color=colour, linewidth=1.6, label=label, **_marker(shown))
    _band(ax, steps, middle, running_median(stderr, width), colour, positive=positive)
    return True


def running_median(y: Floats, width: int) -> Floats:
    """Median over a centred window, NaN left out; NaN where the value itself is one."""
    half = width // 2
    padded = np.concatenate([np.full(half, np.nan), y, np.full(half, np.nan)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    with np.errstate(all="ignore"):
        filled = np.array([np.median(w[np.isfinite(w)]) if np.isfinite(w).any() else np.nan for w in windows])
    return np.where(np.isfinite(y), filled, np.nan)


def drawable(values: Floats, *, positive: bool) -> npt.NDArray[np.bool_]:
    """Finite, and above zero where the axis is logarithmic."""
    with np.errstate(invalid="ignore"):
        return np.isfinite(values) & ((values > 0) | (not positive))


def mark_missing(ax: Any, series: Series, not_drawn: Steps) -> None:
    """Marks at the foot of the axis, explained by `MARKS`, not by the legend."""
    steps_of = {
        "skipped": series.steps[series.status == "skipped"],
        "failed": series.steps[series.status == "failed"],
        "no finite value": not_drawn,
    }
    for name, steps in steps_of.items():
        if len(steps):
            marker, colour, _ = MARKS[name]
            foot = np.full(len(steps), 0.025)
            drawn = ax.scatter(steps, foot, marker=marker, s=18, color=colour, transform=ax.get_xaxis_transform())
            drawn.set_gid(name)


def marks_in(axes: Sequence[Any]) -> list[str]:
    """The kinds of marks that these axes have."""
    found = {drawn.get_gid() for ax in axes for drawn in ax.collections}
    return [name for name in MARKS if name in found]


def limit(ax: Any, columns: Sequence[Floats], edge: float | None) -> None:
    """Keep a few outliers from flattening the rest: the axis shows the middle 90 % and the edge, and says so."""
    values = np.concatenate([column[np.isfinite(column)] for column in columns])
    low, high = np.percentile(values, [5, 95])
    if edge is not None:
        low, high = min(low, edge), max(high, edge)
    margin = 0.25 * (high - low) or 0.1
    outside = int(((values < low - margin) | (values > high + margin)).sum())
    if outside and len(values) >= MANY:
        ax.set_ylim(low - margin, high + margin)
        ax.set_title(f"{outside} of {len(values)} values outside", loc="right", fontsize=NOTE_SIZE, color=INK)


def edge(ax: Any, value: float, label: str) -> None:
    """A value that means something by itself."""
    ax.axhline(value, color=INK, linewidth=1.0, linestyle="--", label=label)


def moving_edge(ax: Any, series: Series, label: str) -> None:
    """An edge that changes along the run; where there is none nothing is drawn."""
    values = np.asarray(series.values, dtype=np.float64)
    shown = drawable(values, positive=True)
    if np.count_nonzero(shown) == 1:
        edge(ax, float(values[shown][0]), label)
    elif shown.any():
        y = np.where(shown, values, np.nan)
        ax.plot(series.steps, y, color=INK, linewidth=1.0, linestyle="--", label=label)


def _marker(shown: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Markers where points are few enough to be told apart, and where a lone point would make no line."""
    return {"marker": "o", "markersize": 2.5} if np.count_nonzero(shown) <= MANY else {}
