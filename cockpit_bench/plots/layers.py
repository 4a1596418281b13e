"""Outputs with one entry a layer, module or parameter group: a line each, or the band between least and largest.

Shapes: S = readings that were taken, L = entries of a reading.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import matplotlib
import numpy as np

from cockpit_bench.plots.curves import Floats, Steps, drawable, mark_missing
from cockpit_bench.plots.style import CYCLE
from cockpit_bench.runlog import Reading, Run, Series
from cockpit_bench.runlog.modules import names_of

EXTREMES = 2  # to either side
MOST_KEYS = 8  # in a legend; lines beyond are told apart by their shade
SHADES = "viridis"  # dark to light, read alike by the colour-blind: first layer dark, last light


def stacked(series: Series) -> tuple[Steps, Floats]:
    """Steps and values_SL of the readings that were taken; NaN fills up those that had fewer entries than others."""
    taken = [(step, value) for step, value in zip(series.steps, series.values, strict=True) if np.ndim(value) == 1]
    values_SL = np.full((len(taken), max((len(value) for _, value in taken), default=0)), np.nan)
    for row_L, (_, value) in zip(values_SL, taken, strict=True):
        row_L[: len(value)] = value
    return np.array([step for step, _ in taken], dtype=np.int64), values_SL


def lines(ax: Any, series: Series, names: Sequence[str], *, positive: bool = False) -> bool:
    """One line an entry; False when nothing can be drawn. The legend names at most `MOST_KEYS` of them: the two that
    end lowest, the two that end highest, and others evenly chosen.

    Up to six lines have the colours of every plot, more have shades in the order of the entries.
    """
    steps, values_SL = stacked(series)
    shown_SL = drawable(values_SL, positive=positive)
    mark_missing(ax, series, steps[~shown_SL.any(axis=1)])
    count = values_SL.shape[1]
    colours = CYCLE if count <= len(CYCLE) else matplotlib.colormaps[SHADES](np.linspace(0, 0.9, count))
    named = _named(values_SL)
    marker = {"marker": "o", "markersize": 2.5} if len(steps) <= 1 else {}
    for index in range(count):
        name = names[index] if index < len(names) else str(index)
        y = np.where(shown_SL[:, index], values_SL[:, index], np.nan)
        label = name if index in named else "_" + name
        ax.plot(steps, y, color=colours[index], linewidth=1.2, label=label, **marker)
    return bool(shown_SL.any())


def _named(values_SL: Floats) -> set[int]:
    count = values_SL.shape[1]
    last_L = np.array([next((v for v in reversed(column) if np.isfinite(v)), np.nan) for column in values_SL.T])
    order = [int(index) for index in np.argsort(last_L, kind="stable") if np.isfinite(last_L[index])]
    extremes = order if count <= MOST_KEYS else [*order[:EXTREMES], *order[-EXTREMES:]]
    evenly = np.linspace(0, count - 1, min(count, MOST_KEYS)).round().astype(int).tolist()
    return set(list(dict.fromkeys([*extremes, *evenly]))[:MOST_KEYS])


def spread(ax: Any, series: Series, colour: str, label: str, *, positive: bool = False) -> bool:
    """From the least to the largest entry as a band; entries without a drawable value are left out of it."""
    steps, values_SL = stacked(series)
    shown_SL = drawable(values_SL, positive=positive)
    some = shown_SL.any(axis=1)
    if not some.any():
        return False
    low = np.where(shown_SL, values_SL, np.inf).min(axis=1)
    high = np.where(shown_SL, values_SL, -np.inf).max(axis=1)
    low, high = np.where(some, low, np.nan), np.where(some, high, np.nan)
    ax.fill_between(steps, low, high, color=colour, alpha=0.18, lw=0, label=label)
    return True


def by_module(series: Series, readings: Sequence[Reading]) -> tuple[Series, list[str]]:
    """A per-module output with one place for each module that was ever named, in the order of appearance.

    Readings may list different modules: one that a reading does not have is NaN there.
    """
    rows = [
        dict(zip(names_of(reading, len(value)), value, strict=True)) if np.ndim(value) == 1 else None
        for reading, value in zip(readings, series.values, strict=True)
    ]
    names = list(dict.fromkeys(name for row in rows if row is not None for name in row))
    values = [None if row is None else np.array([row.get(name, np.nan) for name in names]) for row in rows]
    return replace(series, values=values), names


def names_in(run: Run) -> list[str]:
    """The layers that per-layer outputs are about, in their order; empty where the log does not say."""
    events = [event for event in run.events if event.name == "layers"]
    return [str(name) for name in events[-1].detail.get("names", [])] if events else []
