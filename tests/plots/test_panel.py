"""The panel picture: every kind of log draws, marks and gaps are where they belong, numbers are the run's."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cockpit_bench.plots import curves
from cockpit_bench.plots.panel import PANES, headline, panel, save
from cockpit_bench.runlog import Event, Header, Metrics, Outcome, Reading, Record, Run

NAN, INF = float("nan"), float("inf")
TARGET = {"metric": "valid_accuracy", "value": 0.9, "direction": "at_least"}
VALUES = {
    "batch/loss": ["loss"],
    "step/step_ratio": ["r"],
    "gradient/norm": ["norm"],
    "gradient/noise_scale": ["noise_scale", "norm_test"],
    "curvature/sharpness": ["sharpness"],
    "curvature/preconditioned_sharpness": ["rho"],
}


def reading(label: str, step: int, value: float, status: Any = "ok", reason: str = "") -> Reading:
    values = dict.fromkeys(VALUES[label], value) if status == "ok" else {}
    return Reading(label, step, step / 100, status, values, dict.fromkeys(values, abs(value) / 10), reason=reason)


def outcome(status: Any = "hit", **changes: Any) -> Outcome:
    fields = {
        "status": status, "step": 50, "seconds": 0.5, "hit_step": 20, "hit_seconds": 0.2, "best": 0.95, "reason": "",
        "buckets": {"forward": 0.3, "observe": 0.2, "evaluate": 0.1}, "wall": 0.8, "tax": {"batch/loss": 0.05},
    }  # fmt: skip
    return Outcome(**{**fields, **changes})


def make(records: list[Record], target: dict[str, Any] | None = TARGET) -> Run:
    return Run(Path("runs/x"), Header("x", "now", extra={"target": target}), records, 0, {}, {}, {})


def full() -> list[Record]:
    records: list[Record] = [reading(label, step, 1.0 + step / 10) for label in VALUES for step in range(50)]
    records += [Metrics(step, step / 100, {"valid_accuracy": 0.5 + step / 100}, "evaluation") for step in (0, 20, 40)]
    return [*records, Event(20, 0.2, "target_hit"), outcome()]


def texts(figure: Any) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def test_the_picture_is_1600_by_1000(tmp_path: Path) -> None:
    path = tmp_path / "panel.png"
    save(panel(make(full())), path)
    assert struct.unpack(">II", path.read_bytes()[16:24]) == (1600, 1000)
    for ending in ("pdf", "svg"):
        save(panel(make(full())), tmp_path / f"panel.{ending}")
        assert (tmp_path / f"panel.{ending}").stat().st_size > 5000


def test_it_says_how_the_run_went() -> None:
    shown = texts(panel(make(full())))
    for text in ("hit: step 20, 0.2 s", "target ≥ 0.9", "edge of stability", "valid_accuracy", "hit at step 20"):
        assert text in shown
    assert "was not read" not in shown


@pytest.mark.parametrize("value", [NAN, INF, -INF, 0.0, -1.0, 1e300, 1e-300])
def test_every_value_draws(value: float, tmp_path: Path) -> None:
    records: list[Record] = [reading(label, step, value) for label in VALUES for step in range(5)]
    records += [Metrics(0, 0.0, {"valid_accuracy": value}, "evaluation"), outcome("diverged", hit_step=None, best=None)]
    save(panel(make(records)), tmp_path / "panel.png")


@pytest.mark.parametrize(
    "records",
    [
        [Event(0, 0.0, "data")],
        [reading("batch/loss", 0, 1.0)],
        [outcome(seconds=0.0, wall=0.0, buckets={}, tax={})],
        [reading("curvature/sharpness", 0, 1.0, "failed", "no reader"), reading("batch/loss", 3, NAN)],
        [Metrics(0, 0.0, {"other": 1.0}, "user")],
    ],
)
@pytest.mark.parametrize("target", [TARGET, None])
def test_short_and_empty_logs_draw(records: list[Record], target: Any, tmp_path: Path) -> None:
    save(panel(make(records, target)), tmp_path / "panel.png")


def test_empty_panes_say_why() -> None:
    shown = texts(panel(make([reading("curvature/sharpness", 0, 1.0, "failed", "no reader for Muon")])))
    assert "curvature/sharpness failed:\nno reader for Muon" in shown
    assert "gradient/norm was not read" in shown
    assert "nothing was evaluated" in shown
    assert "known when the run has ended" in shown


def test_gaps_and_marks_are_where_they_belong() -> None:
    records: list[Record] = [
        reading("curvature/sharpness", 0, 1.0),
        reading("curvature/sharpness", 10, NAN),
        reading("curvature/sharpness", 20, 3.0),
        reading("curvature/sharpness", 30, 0.0, "skipped", "over the budget"),
        reading("curvature/sharpness", 40, 0.0, "failed", "broken"),
    ]
    figure = panel(make(records))
    (ax,) = [ax for ax in figure.axes if ax.get_title(loc="left") == "Sharpness"]
    steps, values = ax.lines[0].get_data()
    assert list(steps) == [0, 10, 20]
    assert np.isnan(values[1])
    marks = {
        c.get_label(): c.get_offsets()[:, 0].tolist() for c in ax.collections if len(c.get_offsets()) and c.get_label()
    }
    assert {name: marks[name] for name in ("skipped", "failed", "no finite value")} == {
        "skipped": [30], "failed": [40], "no finite value": [10],
    }  # fmt: skip


def test_outliers_do_not_flatten_the_rest() -> None:
    records: list[Record] = [reading("step/step_ratio", s, 75.0 if s == 50 else 0.1 + 0.001 * s) for s in range(100)]
    figure = panel(make(records))
    (ax,) = [ax for ax in figure.axes if ax.get_title(loc="left") == "Step ratio r"]
    assert ax.get_ylim()[1] < 2
    assert ax.get_ylim()[1] > 1  # the edge is in sight
    assert "1 of 100 values outside" in texts(figure)


def test_the_running_median_follows_and_keeps_gaps() -> None:
    y = np.array([1.0, 100.0, 1.0, np.nan, 2.0, 2.0])
    found = curves.running_median(y, 3)
    assert found[1] == 1.0
    assert np.isnan(found[3])
    assert found[4] == 2.0


def test_the_headline_of_a_running_run() -> None:
    run = Run(Path("runs/x"), None, [reading("batch/loss", 0, 1.0)], 0, {}, {"state": "running"}, {})
    assert headline(run) == "x: running"
    panel(run)


def test_all_panes_show_outputs_that_exist() -> None:
    from instruments import catalogue

    for pane in PANES:
        for label, output in pane.curves:
            assert output in catalogue.make(label).outputs


def test_pyplot_is_not_touched() -> None:
    import sys

    panel(make(full()))
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
