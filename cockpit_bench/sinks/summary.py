"""How a run ended, as one compact block of text for a terminal of 80 columns."""

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cockpit_bench.runlog import Event, Outcome, Reading, Record

WIDTH = 79
LABEL = 40
SMALL = 0.001  # of the training time: what took less is one line together
SHORT = 60.0  # seconds of training
HANGING: Any = {"subsequent_indent": " " * 9, "max_lines": 4, "placeholder": " ...", "break_on_hyphens": False}
MOST = 12  # instruments with a line each; what took less than they did joins that line


@dataclass
class Faults:
    """Which instruments could not be read: label -> reason, in the order of their first failure."""

    failed: dict[str, str] = field(default_factory=dict)
    retired: dict[str, int] = field(default_factory=dict)

    def take(self, record: Record) -> None:
        if isinstance(record, Reading) and record.status == "failed":
            self.failed[record.instrument] = record.reason
        elif isinstance(record, Event) and record.name == "retired" and "instrument" in record.detail:
            self.retired[str(record.detail["instrument"])] = record.step


def summary(outcome: Outcome, target: str | None, faults: Faults, folder: str | None) -> list[str]:
    """The ending, what each instrument took of the training time, what was skipped, what failed, where the log is."""
    lines = [_ending(outcome, target)]
    if outcome.reason:
        lines.append(f"reason   {outcome.reason}")
    lines.append(f"steps    {outcome.step} in {number(outcome.seconds)} s of training, {number(outcome.wall)} s in all")
    lines += _tax_lines(outcome) + _fault_lines(faults)
    lines = [part for line in lines for part in textwrap.wrap(line, WIDTH, **HANGING)]
    return lines if folder is None else [*lines, f"log      {folder}"]  # whole: it is there to be copied


def _ending(outcome: Outcome, target: str | None) -> str:
    text: str = outcome.status
    if outcome.hit_step is not None:
        text += f" at step {outcome.hit_step} ({number(outcome.hit_seconds)} s)"
    if target is not None:
        text += f", target {target}"
    return text if outcome.best is None else f"{text}, best {number(outcome.best)}"


def _tax_lines(outcome: Outcome) -> list[str]:
    """Largest first; what took next to nothing, or less than the dozen above, and was never skipped is added up."""
    taxes = {label: finite(seconds) or 0.0 for label, seconds in outcome.tax.items()}
    total = ratio(sum(taxes.values()), outcome.seconds)
    skipped = sum(outcome.skips.values())
    if total is None or not (taxes or skipped):
        return []
    lines = [f"tax      {total:.1%} of the training time" + (f", {skipped} readings skipped" if skipped else "")]
    labels = sorted({**dict.fromkeys(outcome.skips, 0.0), **taxes}, key=lambda name: -taxes.get(name, 0.0))
    shares = {label: taxes.get(label, 0.0) / outcome.seconds for label in labels}
    least = max(SMALL, shares[labels[MOST - 1]] if len(labels) > MOST else 0.0)
    small = [label for label in labels if shares[label] < least and label not in outcome.skips]
    for label in labels if len(small) == 1 else [label for label in labels if label not in small]:
        skips = f"{outcome.skips[label]} skipped" if label in outcome.skips else ""
        lines.append(f"{shares[label]:14.1%}  {shortened(label):{LABEL}}  {skips:>15}".rstrip())
    if len(small) > 1:
        lines.append(f"{sum(shares[label] for label in small):14.1%}  {len(small)} more, each below {least:.1%}")
    if skipped > outcome.step and outcome.seconds < SHORT:
        lines.append("         in so short a run the budget is little; budget=None reads all that is due")
    return lines


def _fault_lines(faults: Faults) -> list[str]:
    lines = []
    for label in {**faults.failed, **faults.retired}:
        reason = faults.failed.get(label, "")
        if label in faults.retired:
            lines.append(f"retired  {shortened(label)} at step {faults.retired[label]}: {reason}")
        else:
            lines.append(f"failed   {shortened(label)}: {reason}")
    return lines


def shortened(label: str) -> str:
    return label if len(label) <= LABEL else label[: LABEL - 3] + "..."


def finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def ratio(part: float, whole: float) -> float | None:
    """None where the answer would be no number."""
    return part / whole if math.isfinite(part) and math.isfinite(whole) and whole > 0 else None


def number(value: Any) -> str:
    try:
        return f"{float(value):.4g}"
    except (TypeError, ValueError, OverflowError):
        return "?"


def details(detail: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in detail.items())
