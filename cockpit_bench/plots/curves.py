"""Scalars over steps: values with gaps where they are not finite, bands of doubt, marks for what was not read."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cockpit_bench.plots.style import FAINT, INK, ORANGE, RED
from cockpit_bench.runlog import Series

MANY = 60  # points from which on a curve is drawn without markers
Floats = npt.NDArray[np.float64]


def scalar(ax: Any, series: Series, colour: str, label: str, *, positive: bool = False) -> bool:
    """One output as a curve; False when no value of it can be drawn.

    Skipped readings are left out of the curve; a value that is NaN, infinite or, on a logarithmic axis, not positive is
    a gap. A standard error is a band of one of them to each side.
    """
    values = np.asarray(series.values, dtype=np.float64)
    read = series.status == "ok"
    steps, values, stderr = series.steps[read], values[read], series.stderr[read]
    shown = np.isfinite(values) & ((values > 0) | (not positive))
    mark_missing(ax, series, steps[~shown])
    if not shown.any():
        return False
    y = np.where(shown, values, np.nan)
    alone = np.count_nonzero(shown) <= MANY
    ax.plot(steps, y, color=colour, linewidth=1.4, label=label, marker="o" if alone else None, markersize=2.5)
    certain = np.isfinite(stderr) & shown
    if certain.any():
        low = np.where(certain, y - stderr, np.nan)
        floor = np.nanmin(y) / 2 if positive else -np.inf
        ax.fill_between(
            steps, np.maximum(low, floor), np.where(certain, y + stderr, np.nan), color=colour, alpha=0.2, lw=0
        )
    return True


def smooth(ax: Any, series: Series, colour: str, label: str, *, positive: bool = False) -> bool:
    """A noisy curve: the values faint, and their running median over a fiftieth of the run on top."""
    values = np.asarray(series.values, dtype=np.float64)
    shown = np.isfinite(values) & ((values > 0) | (not positive)) & (series.status == "ok")
    mark_missing(ax, series, series.steps[(series.status == "ok") & ~shown])
    if not shown.any():
        return False
    width = max(1, len(values) // 50)
    y = np.where(shown, values, np.nan)
    if width < 3:
        ax.plot(series.steps, y, color=colour, linewidth=1.4, label=label)
        return True
    ax.plot(series.steps, y, color=colour, linewidth=0.6, alpha=0.35)
    ax.plot(series.steps, running_median(y, width), color=colour, linewidth=1.6, label=label)
    return True


def running_median(y: Floats, width: int) -> Floats:
    """Median over a centred window, NaN left out; NaN where the value itself is one."""
    half = width // 2
    padded = np.concatenate([np.full(half, np.nan), y, np.full(half, np.nan)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    with np.errstate(all="ignore"):
        filled = np.array([np.median(w[np.isfinite(w)]) if np.isfinite(w).any() else np.nan for w in windows])
    return np.where(np.isfinite(y), filled, np.nan)


def mark_missing(ax: Any, series: Series, not_drawn: npt.NDArray[np.int64]) -> None:
    """Ticks at the foot: skipped (hollow), failed (cross), read but not drawable (dot)."""
    foot = ax.get_xaxis_transform()
    kinds: Sequence[tuple[npt.NDArray[np.int64], str, str, str]] = (
        (series.steps[series.status == "skipped"], "|", FAINT, "skipped"),
        (series.steps[series.status == "failed"], "x", RED, "failed"),
        (not_drawn, "|", ORANGE, "no finite value"),
    )
    for steps, marker, colour, label in kinds:
        if len(steps):
            known = {text.get_label() for text in ax.collections}
            name = label if label not in known else "_" + label
            ax.scatter(steps, np.full(len(steps), 0.02), marker=marker, s=18, color=colour, transform=foot, label=name)


def limit(ax: Any, columns: Sequence[Floats], edge: tuple[float, str] | None) -> None:
    """Keep a few outliers from flattening the rest: the axis shows the middle 96 % and the edge, and says so."""
    values = np.concatenate([column[np.isfinite(column)] for column in columns])
    low, high = np.percentile(values, [2, 98])
    if edge is not None:
        low, high = min(low, edge[0]), max(high, edge[0])
    margin = 0.15 * (high - low) or 0.1
    outside = int(((values < low - margin) | (values > high + margin)).sum())
    if outside and len(values) >= MANY:
        ax.set_ylim(low - margin, high + margin)
        text = f"{outside} of {len(values)} values outside"
        ax.text(0.99, 0.98, text, transform=ax.transAxes, ha="right", va="top", fontsize=7, color=FAINT)


def edge(ax: Any, value: float, label: str) -> None:
    """A value that means something by itself."""
    ax.axhline(value, color=INK, linewidth=1.0, linestyle="--", label=label)
