"""Runs side by side: steps and seconds to the target by group of equal trials, and ratios paired by seed.

A group is everything that differs in the seed alone. A missed target counts as infinitely long, so that the median of a
group is what at least half of its seeds achieved. Imports no torch.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from cockpit_bench.runlog import Run


@dataclass(frozen=True)
class Entry:
    """One run: time to target in both clocks, infinite for a miss; `tax` is observation over training time."""

    folder: str
    seed: int
    outcome: str
    steps: float
    seconds: float
    best: float | None
    tax: float


@dataclass(frozen=True)
class Group:
    """Runs of one trial with several seeds. `target` is what they were timed to, in words; empty where none was set."""

    name: str
    workload: str
    target: str
    entries: tuple[Entry, ...]

    @property
    def hits(self) -> int:
        return sum(math.isfinite(entry.steps) for entry in self.entries)

    @property
    def steps(self) -> float:
        """Median steps to the target over the seeds."""
        return median(entry.steps for entry in self.entries)

    @property
    def seconds(self) -> float:
        """Median training seconds to the target over the seeds."""
        return median(entry.seconds for entry in self.entries)


@dataclass(frozen=True)
class Ratio:
    """`name` over `base`, seed by seed: median, smallest and largest; only seeds that both hit."""

    name: str
    base: str
    pairs: int
    steps: tuple[float, float, float]
    seconds: tuple[float, float, float]


def compare(runs: Sequence[Run]) -> tuple[list[Group], list[Ratio]]:
    """Groups, fastest first, and every other group of a workload against its fastest.

    Groups are compared within a workload and a target only, and runs round a loop, of which nobody knows what they
    trained, not at all. Raises ValueError for a run that has not ended.
    """
    groups = sorted(_groups(runs), key=lambda group: (group.workload, group.target, group.seconds, group.steps))
    ratios = []
    for problem in dict.fromkeys((group.workload, group.target) for group in groups if group.workload):
        base, *others = [group for group in groups if (group.workload, group.target) == problem]
        ratios += [ratio for other in others if (ratio := _paired(other, base)) is not None]
    return groups, ratios


def _groups(runs: Sequence[Run]) -> list[Group]:
    found: dict[str, tuple[Mapping[str, Any], list[Entry]]] = {}
    targets: dict[str, str] = {}
    for run in runs:
        trial = {key: value for key, value in run.trial.items() if key != "seed"}
        key = json.dumps(trial or {"folder": run.folder.name}, sort_keys=True)
        found.setdefault(key, (trial, []))[1].append(_entry(run))
        targets[key] = _target(run)
    names = _names([trial for trial, _ in found.values()])
    return [
        Group(
            name or entries[0].folder,
            str(trial.get("workload", "")),
            targets[key],
            tuple(sorted(entries, key=lambda e: e.seed)),
        )
        for name, (key, (trial, entries)) in zip(names, found.items(), strict=True)
    ]


def _target(run: Run) -> str:
    target = (run.header.extra.get("target") if run.header else None) or {}
    sign = {"at_least": ">=", "at_most": "<="}.get(str(target.get("direction")), "")
    return f"{target['metric']} {sign} {target['value']:g}" if target else ""


def _entry(run: Run) -> Entry:
    outcome = run.outcome
    if outcome is None:
        raise ValueError(f"expected runs that have ended, got {run.folder}, which has no outcome; wait or leave it out")
    hit = outcome.hit_step is not None and outcome.hit_seconds is not None
    return Entry(
        folder=run.folder.name,
        seed=int(run.trial.get("seed", 0)),
        outcome=outcome.status,
        steps=float(outcome.hit_step) if hit and outcome.hit_step is not None else math.inf,
        seconds=outcome.hit_seconds if hit and outcome.hit_seconds is not None else math.inf,
        best=outcome.best,
        tax=sum(outcome.tax.values()) / outcome.seconds if outcome.seconds > 0 else math.nan,
    )


def _names(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    """Workload and algorithm, and where groups share these, the other settings that differ among them."""
    flat = [{**trial, **trial.get("hyperparameters", {})} for trial in trials]
    short = [f"{trial.get('workload', '')} {trial.get('algorithm', '')}".strip() for trial in flat]
    names = []
    for name, trial in zip(short, flat, strict=True):
        alike = [other for other, theirs in zip(flat, short, strict=True) if theirs == name]
        keys = sorted({key for other in alike for key in other} - {"hyperparameters"})
        differing = [key for key in keys if len({str(other.get(key)) for other in alike}) > 1 and key in trial]
        names.append(" ".join([name, *(f"{key}={trial[key]}" for key in differing)]))
    return names


def _paired(group: Group, base: Group) -> Ratio | None:
    by_seed = {entry.seed: entry for entry in base.entries if math.isfinite(entry.steps)}
    pairs = [(e, by_seed[e.seed]) for e in group.entries if e.seed in by_seed and math.isfinite(e.steps)]
    if not pairs:
        return None
    steps = [one.steps / other.steps for one, other in pairs if other.steps > 0]
    seconds = [one.seconds / other.seconds for one, other in pairs if other.seconds > 0]
    return Ratio(group.name, base.name, len(pairs), _spread(steps), _spread(seconds))


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    if not values:
        return math.nan, math.nan, math.nan
    return median(values), min(values), max(values)
