"""Where the time went: buckets of the clock and the tax of every instrument, as bars."""

import textwrap
from collections.abc import Mapping
from typing import Any

from matplotlib.ticker import MaxNLocator

from cockpit_bench.clock import OFF_CLOCK_BUCKETS
from cockpit_bench.plots.style import BLUE, INK, NOTE_SIZE, ORANGE, TEXT_SIZE, legend, nothing
from cockpit_bench.runlog import Reading, Run

SMALLEST = 5e-4  # of the whole: less is not drawn
FEWEST_ROWS = 8  # fewer bars are not drawn wider
MOST_ROWS = 22  # of more instruments the cheapest are added up
NAME_WIDTH = 15  # characters, then a name goes on in a second line


def buckets(ax: Any, seconds: Mapping[str, float], tax: Mapping[str, float]) -> None:
    """Training buckets in one colour, off-clock ones in another with `observe` split by instrument; seconds as text."""
    rows = [(name, value, BLUE) for name, value in seconds.items() if name not in OFF_CLOCK_BUCKETS]
    aside = [name for name in seconds if name in OFF_CLOCK_BUCKETS and name != "observe"]
    rows += [(name, seconds[name], ORANGE) for name in aside]
    known = sum(tax.values())
    taxed = sorted(tax.items(), key=lambda item: -item[1])
    room = MOST_ROWS - len(rows) - 1
    if len(taxed) > room:
        rest = [value for _, value in taxed[room - 1 :]]
        taxed = [*taxed[: room - 1], (f"{len(rest)} other instruments", sum(rest))]
    rows += [(label.rpartition("/")[2].replace("_", " "), value, ORANGE) for label, value in taxed]
    rows.append(("observe, the rest", max(0.0, seconds.get("observe", 0.0) - known), ORANGE))
    whole = sum(value for _, value, _ in rows)
    rows = [row for row in rows if row[1] > SMALLEST * whole][::-1]
    if not rows:
        nothing(ax, "no time was spent yet")
        return
    names, values, colours = zip(*rows, strict=True)
    places = range(len(rows))
    ax.barh(places, values, color=colours, height=0.7)
    ax.set_yticks(places, [textwrap.fill(name, NAME_WIDTH) for name in names], fontsize=TEXT_SIZE, linespacing=0.9)
    for place, value in zip(places, values, strict=True):
        ax.text(value, place, f" {value:.3g} s", va="center", fontsize=NOTE_SIZE, color=INK)
    ax.set_xlim(0, max(values) * 1.25)
    ax.set_ylim(len(rows) - max(len(rows), FEWEST_ROWS) - 0.5, len(rows) - 0.5)
    ax.grid(False, axis="y")
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.set_xlabel("seconds", fontsize=TEXT_SIZE, color=INK)
    for colour, meaning in ((BLUE, "training: counts towards the target"), (ORANGE, "the rest does not")):
        ax.bar(0, 0, color=colour, label=meaning)
    legend(ax, columns=1)


def spent(run: Run) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Buckets and tax: of the outcome, or what the readings of a run that has none add up to."""
    if run.outcome is not None:
        return run.outcome.buckets, run.outcome.tax
    tax: dict[str, float] = {}
    for record in run.records:
        if isinstance(record, Reading) and "seconds" in record.cost:
            tax[record.instrument] = tax.get(record.instrument, 0.0) + record.cost["seconds"]
    training = max((record.seconds for record in run.records), default=0.0)
    return {"training": training, "observe": sum(tax.values())}, tax
