"""A run as a piece of HTML for a notebook: how it ended, the last readings with their doubt, and what they took."""

import html
import math
from typing import Any

from cockpit_bench.runlog.brief import brief
from cockpit_bench.runlog.reading import Outcome, Reading
from cockpit_bench.runlog.run import Run
from cockpit_bench.tables import duration, html_table, share

HEAD = ("instrument", "output", "last value", "±", "unit", "step", "readings", "tax")


def page(run: Run) -> str:
    """Headline, outcome, one table row an output, and notes on what was skipped or failed. Escaped throughout."""
    rows = [HEAD, *(row for label in run.instruments for row in _rows(run, label))]
    parts = [f"<h4>{html.escape(headline(run))}</h4>", *(f"<p>{html.escape(line)}</p>" for line in _facts(run))]
    return "<div>" + "".join(parts) + (html_table(rows) if len(rows) > 1 else "<p>nothing was read</p>") + "</div>"


def headline(run: Run) -> str:
    """What was run, how it ended and after how long."""
    trial, outcome = run.trial, run.outcome
    what = f"{trial['workload']}, {trial['algorithm']}, seed {trial['seed']}" if trial else run.folder.name
    if outcome is None:
        return f"{what}: {run.status.get('state', 'not closed')}"
    hit = f" at step {outcome.hit_step}, {duration(outcome.hit_seconds)}" if outcome.hit_seconds is not None else ""
    return f"{what}: {outcome.status}{hit}; {outcome.step} steps in {duration(outcome.seconds)} of training"


def _facts(run: Run) -> list[str]:
    """Metrics, and the tax of a run that has ended."""
    lines = [f"{name} {_text(series.values[-1])} at step {series.steps[-1]}" for name, series in run.metrics.items()]
    facts = ["; ".join(lines)] if lines else []
    outcome = run.outcome
    if outcome is not None:
        if outcome.reason:
            facts.append(f"reason: {outcome.reason}")
        total = duration(math.fsum(outcome.tax.values()))
        skipped = sum(outcome.skips.values())
        more = f"; {skipped} readings were skipped, over the budget" if skipped else ""
        facts.append(f"observation took {total}, {_tax(outcome, None)} of the training time{more}")
    return facts


def _rows(run: Run, label: str) -> list[tuple[str, ...]]:
    """One row an output of the last reading that was ok; one row with the reason where there was none."""
    readings = run[label].readings
    counts = ", ".join(
        f"{count} {status}"
        for status in ("ok", "skipped", "failed")
        if (count := sum(reading.status == status for reading in readings))
    )
    tax = _tax(run.outcome, label)
    good = next((reading for reading in reversed(readings) if reading.status == "ok"), None)
    if good is None:
        return [(label, readings[-1].status, readings[-1].reason, "", "", str(readings[-1].step), counts, tax)]
    rows = [_row(run, label, good, output) for output in good.values]
    first = (label, *rows[0][1:6], counts, tax)
    return [first, *rows[1:]]


def _row(run: Run, label: str, reading: Reading, output: str) -> tuple[str, ...]:
    doubt = reading.stderr.get(output, math.nan)
    kind = run.declared(label).get(output, {}).get("kind")
    value = reading.values[output]
    text = brief(value, kind) if kind in ("histogram", "spectrum", "grid") else _text(value)
    error, unit = "" if math.isnan(doubt) else f"{doubt:.2g}", run.unit(label, output)
    return ("", output, text, error, unit, str(reading.step), "", "")


def _tax(outcome: Outcome | None, label: str | None) -> str:
    """Of one label, or of all, as a share of the training time; empty before the run has ended."""
    if outcome is None:
        return ""
    seconds = math.fsum(outcome.tax.values()) if label is None else outcome.tax.get(label, 0.0)
    return share(seconds, outcome.seconds)


def _text(value: Any) -> str:
    """A number in four digits; an array by its size and range."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, list):
        return f"{value:.4g}"
    numbers = [number for number in _flat(value) if math.isfinite(number)]
    if not numbers:
        return f"{len(value)} values"
    if len(value) == 1:
        return f"{numbers[0]:.4g}"
    return f"{len(value)} values, {min(numbers):.3g} to {max(numbers):.3g}"


def _flat(values: Any) -> list[float]:
    return [number for value in values for number in _flat(value)] if isinstance(values, list) else [float(values)]
