"""The panel picture of a run: did it get there, how did the loss go, and what do step, gradient and curvature say."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cockpit_bench.plots import curves
from cockpit_bench.plots.buckets import buckets
from cockpit_bench.plots.style import CYCLE, GREEN, INK, nothing, prepare
from cockpit_bench.runlog import Run, Series

WIDTH, HEIGHT, DPI = 16.0, 10.0, 100  # 1600 x 1000 pixels


@dataclass(frozen=True)
class Pane:
    """One axis: the outputs it shows, found by label and output, and how."""

    title: str
    curves: Mapping[tuple[str, str], str]
    unit: str = ""
    log: bool = False
    noisy: bool = False
    edge: tuple[float, str] | None = None


PANES = (
    Pane("Training loss", {("batch/loss", "loss"): "batch"}, log=True, noisy=True),
    Pane(
        "Step ratio r",
        {("step/step_ratio", "r"): "r = ½ u'Hu / (−g'u)"},
        "share of the gain lost to curvature",
        edge=(1.0, "edge: nothing gained"),
        noisy=True,
    ),
    Pane("Gradient norm", {("gradient/norm", "norm"): "|g|"}, log=True, noisy=True),
    Pane("Noise scale", {("gradient/noise_scale", "noise_scale"): "pooled, ± standard error"}, "examples", log=True),
    Pane(
        "Norm test",
        {("gradient/noise_scale", "norm_test"): "θ² = tr Σ / (B |g|²)"},
        noisy=True,
        edge=(1.0, "the batch gradient is noise"),
    ),
    Pane("Sharpness", {("curvature/sharpness", "sharpness"): "λ_max of the Hessian"}, log=True),
    Pane(
        "ρ: sharpness as the optimizer sees it",
        {("curvature/preconditioned_sharpness", "rho"): "ρ"},
        log=True,
        edge=(1.0, "edge of stability"),
    ),
)


def panel(run: Run) -> Figure:
    """The figure, 1600 x 1000 pixels at its own resolution; not attached to pyplot, so no global state is touched."""
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 3).ravel()
    metric(axes[0], run)
    for ax, pane in zip(axes[1:], PANES, strict=False):
        draw(ax, run, pane)
    clock(axes[8], run)
    last = max((record.step for record in run.records), default=0)
    for ax in axes[:8]:
        ax.set_xlim(-0.01 * max(last, 1), max(last, 1) * 1.01)
    for ax in axes[5:8]:
        ax.set_xlabel("optimizer step", fontsize=9, color=INK)
    figure.suptitle(headline(run), x=0.01, ha="left", fontsize=13, color=INK)
    return figure


def headline(run: Run) -> str:
    """What was run and how it ended, in one line."""
    trial = run.trial
    what = f"{trial['workload']}, {trial['algorithm']}, seed {trial['seed']}" if trial else run.folder.name
    outcome = run.outcome
    if outcome is None:
        return f"{what}: {run.status.get('state', 'not closed')}"
    text = f"{what}: {outcome.status}"
    if outcome.hit_step is not None and outcome.hit_seconds is not None:
        text += f" at step {outcome.hit_step}, {outcome.hit_seconds:.3g} s of training"
    share = sum(outcome.tax.values()) / outcome.seconds if outcome.seconds > 0 else float("nan")
    return f"{text}; {outcome.step} steps in {outcome.seconds:.3g} s of training, observation {share:.1%} on top"


def metric(ax: Any, run: Run) -> None:
    """Evaluated metrics; where there is a target its own metric alone, the target as a line, the hit as a mark."""
    target = (run.header.extra.get("target") if run.header else None) or {}
    names = [target["metric"]] if target.get("metric") in run.metrics else list(run.metrics)[:4]
    prepare(ax, "Metric and target" if target else "Metrics")
    for name, colour in zip(names, CYCLE, strict=False):
        curves.scalar(ax, run.metrics[name], colour, name)
    if not names:
        nothing(ax, "nothing was evaluated")
        return
    if target:
        sign = "≥" if target["direction"] == "at_least" else "≤"
        curves.edge(ax, float(target["value"]), f"target {sign} {target['value']:g}")
    outcome = run.outcome
    hit = next((e.step for e in run.events if e.name == "target_hit"), None)
    if hit is not None:
        seconds = f", {outcome.hit_seconds:.3g} s" if outcome is not None and outcome.hit_seconds is not None else ""
        ax.axvline(hit, color=GREEN, linewidth=1.2, label=f"hit: step {hit}{seconds}")
    ax.legend(fontsize=8, frameon=False, loc="best")


def draw(ax: Any, run: Run, pane: Pane) -> None:
    """One pane; it says why when it has nothing to show."""
    found = {key: run[key[0]][key[1]] for key in pane.curves if key[0] in run and key[1] in run[key[0]]}
    log = pane.log and any((np.asarray(series.values) > 0).any() for series in found.values())
    prepare(ax, pane.title, pane.unit or unit(run, *next(iter(pane.curves))), log=log)
    drawn = [
        (curves.smooth if pane.noisy else curves.scalar)(ax, series, colour, pane.curves[key], positive=log)
        for (key, series), colour in zip(found.items(), CYCLE, strict=False)
    ]
    if not any(drawn):
        nothing(ax, why_empty(run, [label for label, _ in pane.curves], found))
        return
    if pane.edge is not None:
        curves.edge(ax, *pane.edge)
    if not log:
        curves.limit(ax, [np.asarray(series.values) for series in found.values()], pane.edge)
    ax.legend(fontsize=8, frameon=False, loc="best")


def why_empty(run: Run, labels: list[str], found: Mapping[Any, Series]) -> str:
    """The reason for an empty pane: not in the panel, failed with a reason, or no finite value."""
    label = labels[0]
    if label not in run:
        return f"{label} was not read"
    bad = [reading for reading in run[label].readings if reading.status != "ok"]
    if bad and not found:
        return f"{label} {bad[-1].status}:\n{bad[-1].reason[:160]}"
    return f"{label}: no finite value"


def unit(run: Run, label: str, output: str) -> str:
    """The declared unit, where it says something."""
    declared = run.header.extra.get("instruments", {}) if run.header else {}
    text = str(declared.get(label, {}).get("outputs", {}).get(output, {}).get("unit", ""))
    return "" if text == "1" else text


def clock(ax: Any, run: Run) -> None:
    """Buckets and tax, once the run has ended."""
    prepare(ax, "Where the time went")
    outcome = run.outcome
    if outcome is None or outcome.wall <= 0:
        nothing(ax, "known when the run has ended")
        return
    buckets(ax, outcome.buckets, outcome.tax)
    ax.set_xlabel("seconds; blue counts towards the target, orange does not", fontsize=9, color=INK)


def save(figure: Figure, path: Any) -> None:
    """Write a figure; the format follows from the ending (png, pdf, svg)."""
    figure.savefig(path, dpi=DPI)
