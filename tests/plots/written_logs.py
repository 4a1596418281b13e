"""Runs written by hand for the plots, and what to ask of a figure."""

import functools
from pathlib import Path
from typing import Any

from cockpit_bench.plots.panel import panel
from cockpit_bench.runlog import Event, Header, Metrics, Outcome, Reading, Record, Run

NAN, INF = float("nan"), float("inf")
TARGET = {"metric": "valid_accuracy", "value": 0.9, "direction": "at_least"}
ARRAYS = {"step/learning_rate": ["learning_rate"], "step/update_ratio": ["per_layer"]}
VALUES = {
    "batch/loss": ["loss"],
    "step/learning_rate": [],
    "step/step_ratio": ["r", "alpha"],
    "step/update_ratio": ["update_ratio"],
    "network/weight_norm": ["weight_norm"],
    "gradient/norm": ["norm"],
    "gradient/noise_scale": ["noise_scale", "norm_test"],
    "gradient/signal_to_noise": ["aggregate", "median"],
    "curvature/sharpness": ["sharpness", "edge"],
    "curvature/preconditioned_sharpness": ["rho"],
    "curvature/smallest": ["smallest"],
}
STANDARD = [label for label in VALUES if label not in ("gradient/signal_to_noise", "curvature/smallest")]
LIGHT = ["batch/loss", "step/learning_rate", "step/update_ratio", "network/weight_norm", "gradient/norm"]


def reading(label: str, step: int, value: float, status: Any = "ok", reason: str = "", **values: Any) -> Reading:
    scalars = dict.fromkeys(VALUES[label], value)
    arrays = {name: [value, 2 * value] for name in ARRAYS.get(label, [])}
    stderr = dict.fromkeys(VALUES[label], abs(value) / 10)
    if status != "ok":
        return Reading(label, step, step / 100, status, reason=reason)
    facts = {"examples": 64}
    return Reading(label, step, step / 100, "ok", {**scalars, **arrays, **values}, stderr, {"seconds": 0.01}, facts)


def outcome(status: Any = "hit", **changes: Any) -> Outcome:
    fields = {
        "status": status, "step": 50, "seconds": 0.5, "hit_step": 20, "hit_seconds": 0.2, "best": 0.95, "reason": "",
        "buckets": {"forward": 0.3, "observe": 0.2, "evaluate": 0.1}, "wall": 0.8, "tax": {"batch/loss": 0.05},
    }  # fmt: skip
    return Outcome(**{**fields, **changes})


def make(records: list[Record], target: dict[str, Any] | None = TARGET) -> Run:
    return Run(Path("runs/x"), Header("x", "now", extra={"target": target}), records, 0, {}, {}, {})


def full(labels: Any = VALUES) -> list[Record]:
    records: list[Record] = [reading(label, step, 1.0 + step / 10) for label in labels for step in range(50)]
    records += [Metrics(step, step / 100, {"valid_accuracy": 0.5 + step / 100}, "evaluation") for step in (0, 20, 40)]
    return [*records, Event(20, 0.2, "target_hit"), outcome()]


def pane(figure: Any, title: str) -> Any:
    (found,) = [ax for ax in figure.axes if ax.get_title(loc="left") == title]
    return found


def keys(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def marks(ax: Any) -> dict[str, list[int]]:
    return {c.get_gid(): c.get_offsets()[:, 0].tolist() for c in ax.collections if c.get_gid()}


@functools.cache
def full_panel() -> Any:
    return panel(make(full()))


def texts(figure: Any) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))
