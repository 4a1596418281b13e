"""`cockpit-bench show`: what a run folder says, in text and in JSON. Imports no torch."""

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cockpit_bench.runlog import Outcome, Run, read_run
from cockpit_bench.runlog.brief import FEW, brief
from cockpit_bench.runlog.codec import spell
from cockpit_bench.runlog.folder import LOG


def call(arguments: argparse.Namespace) -> None:
    """Print a run."""
    print_run(read_run(latest(Path(arguments.run))), arguments.json)


def latest(path: Path) -> Path:
    """A run folder, or the newest one in a folder of runs."""
    if (path / LOG).exists() or not path.is_dir():
        return path
    logs = sorted(path.glob(f"*/{LOG}"), key=lambda log: log.stat().st_mtime)
    return logs[-1].parent if logs else path


def print_run(run: Run, as_json: bool) -> None:
    """Outcome, clock, tax, metrics and the last reading of each instrument."""
    if as_json:
        print(json.dumps(spell(_facts(run)), indent=2, allow_nan=False))
        return
    print("\n".join(_lines(run)))


def _facts(run: Run) -> dict[str, Any]:
    outcome = run.outcome
    return {
        "folder": str(run.folder),
        "trial": dict(run.trial),
        "outcome": None if outcome is None else asdict(outcome),
        "metrics": {name: [float(v) for v in series.values] for name, series in run.metrics.items()},
        "instruments": {name: _last(run, name) for name in run.instruments},
        "bad_lines": run.bad_lines,
    }


def _last(run: Run, name: str) -> dict[str, Any]:
    """Counts by status, and the last reading that was ok, with its provenance."""
    readings = run[name].readings
    good = [r for r in readings if r.status == "ok"]
    counts = {status: sum(r.status == status for r in readings) for status in ("ok", "skipped", "failed")}
    facts: dict[str, Any] = {"readings": counts}
    if good:
        last = good[-1]
        values = {key: _small(value) for key, value in last.values.items()}
        facts |= {"step": last.step, "values": values, "stderr": dict(last.stderr), "provenance": dict(last.provenance)}
    elif readings:
        facts["reason"] = readings[-1].reason
    return facts


def _small(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _lines(run: Run) -> list[str]:
    lines = [f"run       {run.folder}"]
    if run.trial:
        lines.append("trial     " + "  ".join(f"{key}={value}" for key, value in run.trial.items()))
    lines += _outcome_lines(run.outcome, run)
    for name, series in run.metrics.items():
        lines.append(f"metric    {name}: last {series.values[-1]:.5g} at step {int(series.steps[-1])}")
    width = max((len(name) for name in run.instruments), default=0)
    for name in run.instruments:
        first, *more = _reading_lines(run, name, width)
        lines += [f"reading   {first}", *(" " * 10 + line for line in more)]
    if run.bad_lines:
        lines.append(f"log       {run.bad_lines} broken line(s) were left out")
    return lines


def _outcome_lines(outcome: Outcome | None, run: Run) -> list[str]:
    if outcome is None:
        return [f"outcome   none yet ({run.status.get('state', 'not closed')})"]
    lines = [f"outcome   {outcome.status}" + (f": {outcome.reason}" if outcome.reason else "")]
    if outcome.hit_step is not None and outcome.hit_seconds is not None:
        lines.append(f"target    hit at step {outcome.hit_step}, after {outcome.hit_seconds:.3f} s of training")
    elif outcome.best is not None:
        lines.append(f"target    not hit; best {outcome.best:.5g}")
    lines.append(f"steps     {outcome.step} in {outcome.seconds:.3f} s of training ({outcome.wall:.3f} s in all)")
    lines.append("clock     " + "  ".join(f"{name} {value:.3f}" for name, value in outcome.buckets.items()) + "  (s)")
    if outcome.tax:
        total = sum(outcome.tax.values())
        lines.append(f"tax       {_share(total, outcome.seconds)} of the training time")
        for name, seconds in sorted(outcome.tax.items(), key=lambda item: -item[1]):
            lines.append(f"          {_share(seconds, outcome.seconds):>7}  {name}")
    for name, count in outcome.skips.items():
        lines.append(f"skipped   {name}: {count} readings over the budget")
    return lines


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole > 0 else "?"


def _reading_lines(run: Run, name: str, width: int) -> list[str]:
    """Counts and the last values: numbers on one line, longer arrays on one each, and one of provenance."""
    facts = _last(run, name)
    counts = ", ".join(f"{count} {status}" for status, count in facts["readings"].items() if count)
    if "values" not in facts:
        return [f"{name:{width}}  [{counts}] {facts.get('reason', '')}"]
    declared = run.declared(name)
    short = {key: brief(value, declared.get(key, {}).get("kind", "")) for key, value in facts["values"].items()}
    long = [key for key, value in facts["values"].items() if isinstance(value, list) and _long(value)]
    numbers = []
    for key in (key for key in short if key not in long):
        doubt = facts["stderr"].get(key, math.nan)
        numbers.append(f"{key} {short[key]}" + (f" ± {doubt:.2g}" if math.isfinite(doubt) else ""))
    arrays = [f"{key}: {short[key]}" for key in long]
    provenance = ", ".join(_fact(key, value) for key, value in facts["provenance"].items() if value is not None)
    first = f"{name:{width}}  [{counts}] step {facts['step']}: {', '.join(numbers)}".rstrip(": ")
    return [first, *("  " + line for line in (*arrays, f"({provenance})" if provenance else "") if line)]


def _long(values: list[Any]) -> bool:
    """More than fits between numbers on a line."""
    return len(values) > FEW or any(isinstance(value, list) for value in values)


def _fact(key: str, value: Any) -> str:
    """A fact of provenance; of a list of names their number."""
    if isinstance(value, list):
        return f"{key} {len(value)}"
    return f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
