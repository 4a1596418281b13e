"""Where the time went: buckets of the clock and the tax of every instrument, as bars."""

from collections.abc import Mapping
from typing import Any

from cockpit_bench.clock import OFF_CLOCK_BUCKETS
from cockpit_bench.plots.style import BLUE, INK, ORANGE

SMALLEST = 5e-4  # of the whole: less is not drawn


def buckets(ax: Any, seconds: Mapping[str, float], tax: Mapping[str, float]) -> None:
    """Training buckets in one colour, off-clock ones in another with `observe` split by instrument; seconds as text."""
    rows = [(name, value, BLUE) for name, value in seconds.items() if name not in OFF_CLOCK_BUCKETS]
    aside = [name for name in seconds if name in OFF_CLOCK_BUCKETS and name != "observe"]
    rows += [(name, seconds[name], ORANGE) for name in aside]
    known = sum(tax.values())
    taxed = sorted(tax.items(), key=lambda item: -item[1])
    rows += [(label.rpartition("/")[2].replace("_", " "), value, ORANGE) for label, value in taxed]
    rows.append(("observe, the rest", max(0.0, seconds.get("observe", 0.0) - known), ORANGE))
    whole = sum(value for _, value, _ in rows)
    rows = [row for row in rows if row[1] > SMALLEST * whole][::-1]
    names, values, colours = zip(*rows, strict=True)
    places = range(len(rows))
    ax.barh(places, values, color=colours, height=0.7)
    ax.set_yticks(places, names, fontsize=8)
    for place, value in zip(places, values, strict=True):
        ax.text(value, place, f" {value:.3g} s", va="center", fontsize=7, color=INK)
    ax.set_xlim(0, max(values) * 1.2)
    ax.grid(False, axis="y")
