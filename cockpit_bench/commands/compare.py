"""`cockpit-bench compare`: steps and seconds to target, side by side, in text, JSON and a picture. Imports no torch."""

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

from cockpit_bench.bench.comparison import Group, Ratio, compare
from cockpit_bench.runlog import Run, read_run
from cockpit_bench.runlog.codec import spell
from cockpit_bench.runlog.folder import LOG


def call(arguments: argparse.Namespace) -> None:
    """Print the comparison, fastest group of each workload first; --out writes the picture too."""
    runs = _runs([Path(path) for path in arguments.runs])
    groups, ratios = compare(runs)
    if arguments.out:
        from cockpit_bench.plots.comparison import comparison
        from cockpit_bench.plots.panel import save

        save(comparison(runs, groups), arguments.out)
    if arguments.json:
        facts = {"groups": [asdict(group) for group in groups], "ratios": [asdict(ratio) for ratio in ratios]}
        print(json.dumps(spell(facts), indent=2, allow_nan=False))
        return
    print("\n".join(_table(groups) + _lines(ratios)))


def _runs(paths: list[Path]) -> list[Run]:
    """Run folders, and every finished run in folders of runs. A run that was named must be readable; one that was found
    in a folder is else left out with a line that says why."""
    runs: dict[Path, Run] = {}
    for path in paths:
        inside = sorted(log.parent for log in path.glob(f"*/{LOG}"))
        if (path / LOG).exists() or not inside:
            runs[path] = read_run(path)
            continue
        for folder in inside:
            try:
                runs[folder] = read_run(folder)
            except (ValueError, OSError) as error:
                print(f"cockpit-bench: left out: {error}", file=sys.stderr)
    ended = [run for run in runs.values() if run.outcome is not None]
    if not ended:
        raise ValueError(f"expected at least one run that has ended, got {len(runs)} that have not")
    return ended


def _table(groups: list[Group]) -> list[str]:
    rows = [["group", "target", "hits", "steps to target", "seconds to target", "best", "tax"]]
    for group in groups:
        bests = [entry.best for entry in group.entries if entry.best is not None]
        taxes = [entry.tax for entry in group.entries if math.isfinite(entry.tax)]
        rows.append(
            [
                group.name,
                group.target or "none",
                f"{group.hits} of {len(group.entries)}",
                _time(group.steps, [entry.steps for entry in group.entries], "{:.0f}"),
                _time(group.seconds, [entry.seconds for entry in group.entries], "{:.3g}"),
                " ".join(f"{best:.4g}" for best in bests[:3]) + (" ..." if len(bests) > 3 else ""),
                f"{min(taxes):.0%}" if taxes else "?",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _time(middle: float, values: list[float], form: str) -> str:
    """Median, with the range where there are several seeds; a miss is a dash."""

    def one(value: float) -> str:
        return form.format(value) if math.isfinite(value) else "-"

    return one(middle) if len(values) == 1 else f"{one(middle)} ({one(min(values))} to {one(max(values))})"


def _lines(ratios: list[Ratio]) -> list[str]:
    """The ratios in words."""
    lines = [""] if ratios else []
    for ratio in ratios:
        seeds = f"{ratio.pairs} seed{'s' if ratio.pairs > 1 else ''}"
        steps, seconds = (
            f"{m:.3g} times the {what}" + (f" ({low:.3g} to {high:.3g})" if ratio.pairs > 1 else "")
            for (m, low, high), what in ((ratio.steps, "steps"), (ratio.seconds, "seconds"))
        )
        lines.append(f"{ratio.name} took {steps} and {seconds} of {ratio.base}, paired by {seeds}")
    return lines
