"""What a pane of the panel shows: its curves, edges, bands, gaps and marks are where they belong."""

from dataclasses import replace

import numpy as np
import pytest
from written_logs import INF, NAN, VALUES, full_panel, keys, make, marks, pane, reading, texts

from cockpit_bench.plots import curves
from cockpit_bench.plots.panel import panel
from cockpit_bench.plots.panes import PANES
from cockpit_bench.plots.style import CYCLE
from cockpit_bench.runlog import Record


def test_alpha_is_the_right_scale_of_r() -> None:
    ax = pane(full_panel(), "Step ratio r")
    (second,) = ax.child_axes
    ax.figure.canvas.draw()
    low, high = ax.get_ylim()
    assert second.get_ylim() == pytest.approx((2 * low - 1, 2 * high - 1))
    assert "right: α = 2r − 1" in keys(ax)


def test_the_sharpness_is_held_against_its_own_edge() -> None:
    values = [(0, 40.0), (10, 30.0), (20, 20.0)]
    records: list[Record] = [reading("curvature/sharpness", step, 5.0, edge=edge) for step, edge in values]
    ax = pane(panel(make(records)), "Sharpness")
    dashed = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert [line.get_ydata().tolist() for line in dashed] == [[40.0, 30.0, 20.0]]
    assert keys(ax) == ["λ_max of the Hessian", "this optimizer's edge"]
    without: list[Record] = [reading("curvature/sharpness", step, 5.0, edge=NAN) for step, _ in values]
    ax = pane(panel(make(without)), "Sharpness")
    assert keys(ax) == ["λ_max of the Hessian"]
    assert marks(ax) == {}, "no edge is no missing value"


def test_layers_are_a_band_round_the_whole() -> None:
    records: list[Record] = [
        reading("step/update_ratio", step, 0.01, per_layer=[0.001 * (step + 1), NAN, INF, 0.1]) for step in range(3)
    ]
    ax = pane(panel(make(records)), "Update to weight |u| / |θ|")
    assert keys(ax) == ["whole network", "least to largest layer"]
    (band,) = [c for c in ax.collections if c.get_label() == "least to largest layer"]
    y = band.get_paths()[0].vertices[:, 1]
    assert (y.min(), y.max()) == pytest.approx((0.001, 0.1))


def test_the_noise_scale_is_held_against_the_batch() -> None:
    ax = pane(full_panel(), "Noise scale")
    (line,) = [line for line in ax.lines if line.get_label() == "batch: 64"]
    assert set(line.get_ydata()) == {64}


def test_each_group_has_its_learning_rate() -> None:
    records: list[Record] = [reading("step/learning_rate", step, 0.1 * (step + 1)) for step in range(3)]
    ax = pane(panel(make(records)), "Learning rate")
    assert keys(ax) == ["group 0", "group 1"]
    np.testing.assert_allclose([line.get_ydata() for line in ax.lines], [[0.1, 0.2, 0.3], [0.2, 0.4, 0.6]])
    assert [line.get_color() for line in ax.lines] == list(CYCLE[:2])


def test_gaps_and_marks_are_where_they_belong() -> None:
    records: list[Record] = [
        reading("curvature/sharpness", 0, 1.0),
        reading("curvature/sharpness", 10, NAN),
        reading("curvature/sharpness", 20, 3.0),
        reading("curvature/sharpness", 30, 0.0, "skipped", "over the budget"),
        reading("curvature/sharpness", 40, 0.0, "failed", "broken"),
    ]
    figure = panel(make(records))
    ax = pane(figure, "Sharpness")
    steps, values = ax.lines[0].get_data()
    assert list(steps) == [0, 10, 20]
    assert np.isnan(values[1])
    assert marks(ax) == {"skipped": [30], "failed": [40], "no finite value": [10]}
    for meaning in ("skipped: over the budget", "failed: the log has the reason", "no value: NaN"):
        assert meaning in texts(figure)
    assert "Marks" not in texts(full_panel())


def test_a_lone_point_is_seen() -> None:
    figure = panel(make([reading(label, 0, 2.0) for label in VALUES]))
    for shown in PANES:
        assert pane(figure, shown.title).lines[0].get_marker() == "o", shown.title


@pytest.mark.parametrize(
    ("values", "expected"),
    [((1.0, 1.5), ["1.0", "1.2", "1.4"]), ((1.0, 20.0), ["1", "2", "5", "10", "20"]), ((1.0, 1e6), None)],
)
def test_short_logarithmic_axes_have_plain_numbers(values: tuple[float, float], expected: list[str] | None) -> None:
    records: list[Record] = [replace(reading("gradient/norm", s, y), stderr={}) for s, y in enumerate(values)]
    ax = pane(panel(make(records)), "Gradient norm |g|")
    ax.figure.canvas.draw()
    low, high = ax.get_ylim()
    labels = [
        label.get_text()
        for label, place in zip(ax.get_yticklabels(), ax.get_yticks(), strict=True)
        if low <= place <= high
    ]
    assert 2 <= len(labels) <= 8
    if expected is None:
        assert all("10^" in label for label in labels)
    else:
        assert [float(label) for label in labels] == sorted(float(label) for label in labels)
        assert {float(label) for label in expected[1:-1]} <= {float(label) for label in labels}


def test_outliers_do_not_flatten_the_rest() -> None:
    records: list[Record] = [reading("step/step_ratio", s, 75.0 if s == 50 else 0.1 + 0.001 * s) for s in range(100)]
    figure = panel(make(records))
    ax = pane(figure, "Step ratio r")
    assert ax.get_ylim()[1] < 2
    assert ax.get_ylim()[1] > 1  # the edge is in sight
    assert "1 of 100 values outside" in texts(figure)


def test_a_noisy_curve_has_the_error_of_a_reading_round_its_median() -> None:
    label = "gradient/signal_to_noise"
    records: list[Record] = [reading(label, s, 100.0 if s % 5 == 0 else 2.0) for s in range(200)]
    ax = pane(panel(make(records)), "Signal to noise")
    middle = next(line for line in ax.lines if line.get_label() == "whole gradient, ± standard error")
    assert set(middle.get_ydata()) == {2.0}
    y = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (y.min(), y.max()) == pytest.approx((1.8, 2.2))
    few = pane(panel(make(records[:3])), "Signal to noise")
    assert few.collections[0].get_paths()[0].vertices[:, 1].max() == pytest.approx(110)


def test_the_running_median_follows_and_keeps_gaps() -> None:
    y = np.array([1.0, 100.0, 1.0, np.nan, 2.0, 2.0])
    found = curves.running_median(y, 3)
    assert found[1] == 1.0
    assert np.isnan(found[3])
    assert found[4] == 2.0


def test_all_panes_show_outputs_that_exist() -> None:
    from instruments import catalogue

    for shown in PANES:
        outputs = {*shown.curves, *(pair[0] for pair in (shown.moving_edge, shown.layers) if pair)}
        assert outputs <= set(catalogue.make(shown.instrument).outputs), shown.title
