"""The panel picture: every kind of log draws, nothing overlaps, groups have their rows, empty panes say why."""

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from written_logs import (
    INF,
    LIGHT,
    NAN,
    STANDARD,
    TARGET,
    VALUES,
    full,
    full_panel,
    make,
    outcome,
    pane,
    reading,
    texts,
)

from cockpit_bench.plots.buckets import MOST_ROWS
from cockpit_bench.plots.panel import ACROSS, arrange, panel, save
from cockpit_bench.plots.panes import PANES
from cockpit_bench.runlog import Event, Metrics, Reading, Record, Run


def test_the_picture_is_1600_by_1000(tmp_path: Path) -> None:
    path, figure = tmp_path / "panel.png", panel(make(full(LIGHT)))
    save(figure, path)
    assert struct.unpack(">II", path.read_bytes()[16:24]) == (1600, 1000)
    for ending in ("pdf", "svg"):
        save(figure, tmp_path / f"panel.{ending}")
        assert (tmp_path / f"panel.{ending}").stat().st_size > 5000


def test_it_says_how_the_run_went() -> None:
    shown = texts(full_panel())
    for text in ("hit: step 20, 0.2 s", "target ≥ 0.9", "edge of stability", "valid_accuracy", "hit at step 20"):
        assert text in shown
    assert "not read" not in shown.lower()


def check_layout(figure: Any) -> None:
    """No two axes overlap with anything that belongs to them, and nothing leaves the picture."""
    renderer = figure.canvas.get_renderer()
    boxes = [ax.get_tightbbox(renderer) for ax in figure.axes]
    for index, box in enumerate(boxes):
        assert 0 <= box.x0 <= box.x1 <= 1600
        assert 0 <= box.y0 <= box.y1 <= 1000
        for other in boxes[:index]:
            apart = min(box.x1, other.x1) <= max(box.x0, other.x0) or min(box.y1, other.y1) <= max(box.y0, other.y0)
            assert apart, f"{box} and {other}"


@pytest.mark.parametrize("labels", [list(VALUES), STANDARD, LIGHT, []])
def test_nothing_overlaps_and_every_pane_has_ink(labels: list[str]) -> None:
    figure = panel(make(full(labels)))
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)
    check_layout(figure)
    for ax in figure.axes:
        if ax.get_title(loc="left") and ax.lines:
            x0, y0, x1, y1 = (round(edge) for edge in ax.get_window_extent().extents)
            inside = pixels[1000 - y1 + 2 : 1000 - y0 - 2, x0 + 2 : x1 - 2]
            coloured = inside.max(axis=-1) - inside.min(axis=-1) > 60
            assert coloured.sum() > 100, ax.get_title(loc="left")


@pytest.mark.parametrize("target", [{**TARGET, "metric": "validation_perplexity_of_all"}, None])
def test_long_names_and_many_groups_stay_in_their_pane(target: Any) -> None:
    names = ["validation_perplexity_of_all", *(f"a_metric_with_a_long_name_{n}" for n in range(6))]
    records = [r for r in full() if not isinstance(r, Metrics) and getattr(r, "instrument", "") != "step/learning_rate"]
    records = [replace(r, step=r.step * 2500) for r in records]
    records += [Metrics(step, step / 100, dict.fromkeys(names, 1e-7 * step), "evaluation") for step in (0, 10**5)]
    rates = np.linspace(0, 1, 100)
    records += [Reading("step/learning_rate", step, 0.0, "ok", {"learning_rate": rates}) for step in (0, 10**5)]
    figure = panel(make([*records, outcome(hit_step=100_000, hit_seconds=12345.6)], target))
    figure.canvas.draw()
    check_layout(figure)
    assert len(pane(figure, "Learning rate").lines) == 100


def test_a_group_is_a_row_and_small_neighbours_share_one() -> None:
    def shape(labels: Any) -> list[tuple[str, int]]:
        return [(name, len(draws)) for name, draws in arrange(make(full(labels)))]

    assert shape(VALUES) == [("Progress", 3), ("Step", 3), ("Gradient", 3), ("Curvature", 3)]
    assert shape(STANDARD) == [("Progress", 3), ("Step", 3), ("Gradient", 2), ("Curvature", 2)]
    assert shape(LIGHT) == [("Progress", 3), ("Step · Gradient", 3)]
    assert shape([]) == [("Progress", 2)]
    assert max(sum(p.group == group for p in PANES) for group in {p.group for p in PANES}) <= ACROSS


def test_what_was_not_read_is_listed_not_drawn() -> None:
    figure = panel(make(full(LIGHT)))
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert "Sharpness" not in titles
    listed = next(text for text in texts(figure).split("Not read in this run: ")[1:])
    listed = " ".join(listed.split("\n\n")[0].split())
    assert listed.startswith("Step ratio r, Noise scale, Signal to noise, Sharpness, ρ, Smallest eigenvalue.")


def test_step_panes_share_their_axis() -> None:
    figure = full_panel()
    steps = [ax for ax in figure.axes if ax.get_title(loc="left") and "time" not in ax.get_title(loc="left").lower()]
    assert len(steps) == len(PANES) + 1
    assert {ax.get_xlim() for ax in steps} == {(-0.5, 50 * 1.01)}
    assert {round(ax.get_position().x0, 6) for ax in steps} == {round(ax.get_position().x0, 6) for ax in steps[:ACROSS]}


@pytest.mark.parametrize("value", [NAN, -INF, 0.0, -1.0, 1e300])
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
    assert "batch/loss was not read" in shown
    assert "nothing was evaluated" in shown
    assert "no time was spent yet" in shown


def test_a_run_that_goes_on_shows_its_time_so_far() -> None:
    records: list[Record] = [reading("gradient/norm", step, 1.0) for step in (0, 100)]
    ax = pane(panel(make(records)), "Time so far")
    assert [text.get_text() for text in ax.get_yticklabels()] == ["norm", "training"]
    assert [bar.get_width() for bar in ax.patches[:2]] == pytest.approx([0.02, 1.0])


def test_the_headline_says_what_observation_took() -> None:
    running = Run(Path("runs/x"), None, [reading("batch/loss", 0, 1.0)], 0, {}, {"state": "running"}, {})
    assert panel(running).get_suptitle() == "x: running"
    ended = "x: hit at step 20, 200 ms; 50 steps in 500 ms of training, observation 40.0% on top"
    assert full_panel().get_suptitle() == ended


def test_of_many_instruments_the_cheapest_are_one_bar() -> None:
    tax = {f"mine/number_{n}": 0.1 + 0.01 * n for n in range(60)}
    ax = pane(panel(make([outcome(tax=tax, buckets={"forward": 9.0, "observe": 30.0})])), "Where the time went")
    names = [" ".join(label.get_text().split()) for label in ax.get_yticklabels()][::-1]
    assert len(names) == MOST_ROWS
    assert names[:3] == ["forward", "number 59", "number 58"]
    assert names[-2:] == [f"{62 - MOST_ROWS + 1} other instruments", "observe, the rest"]
    widths = [bar.get_width() for bar in ax.patches[:MOST_ROWS]]
    assert sum(widths) == pytest.approx(39.0), "no second is lost"


def test_pyplot_is_not_touched() -> None:
    import sys

    panel(make(full(LIGHT)))
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
