"""Histograms over steps and spectra: what is drawn is what was counted, at the bins and steps it belongs to."""

from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from cockpit_bench.plots.distributions import TICKS, closed, histogram, spectrum
from cockpit_bench.runlog import Reading
from cockpit_bench.runlog.run import Readings

INF, NAN = float("inf"), float("nan")


def series(values: dict[int, Any]) -> Any:
    """A value that is a text is the status of a reading that was not taken."""
    taken = [
        Reading("a/b", step, 0.0, value) if isinstance(value, str) else Reading("a/b", step, 0.0, "ok", {"out": value})
        for step, value in values.items()
    ]
    return Readings("a/b", taken)["out"]


def axes() -> Any:
    return Figure().subplots()


def meshes(ax: Any) -> list[Any]:
    return [drawn for drawn in ax.collections if type(drawn).__name__ == "QuadMesh"]


def test_counts_stand_at_their_steps_and_bins() -> None:
    ax = axes()
    values = {0: [[0.0, 1.0, INF], [5, 0, 7]], 10: [[0.0, 1.0, INF], [1, 100, 0]], 30: [[0.0, 1.0, INF], [0, 2, 3]]}
    assert histogram(ax, series(values))
    (mesh,) = meshes(ax)
    corners = mesh.get_coordinates()
    assert corners[0, :, 0].tolist() == [-5, 5, 20, 40]
    assert corners[:, 0, 1].tolist() == [-1, 0, 1, 2]
    counts = mesh.get_array()
    assert counts.filled(0).tolist() == [[5, 1, 0], [0, 100, 2], [7, 0, 3]]
    assert counts.mask.tolist() == [[False, False, True], [True, False, False], [False, True, False]]
    assert (mesh.norm.vmin, mesh.norm.vmax) == (1, 100)
    assert ax.get_yscale() == "linear"


def test_what_was_not_read_is_a_gap_with_a_mark() -> None:
    ax = axes()
    table = [[0.0, 1.0], [5, 6]]
    assert histogram(ax, series({0: table, 10: "failed", 20: "skipped", 30: [[0.0, 1.0], [NAN, NAN]], 40: table}))
    spans = [mesh.get_coordinates()[0, :, 0].tolist() for mesh in meshes(ax)]
    assert spans == [[-5, 5], [35, 45]]
    marks = {c.get_gid(): c.get_offsets()[:, 0].tolist() for c in ax.collections if c.get_gid()}
    assert marks == {"failed": [10], "skipped": [20], "no finite value": [30]}


def test_bins_may_change_on_the_way() -> None:
    ax = axes()
    assert histogram(ax, series({0: [[0.0, 1.0], [5, 6]], 10: [[0.0, 0.5], [1, 50]], 20: [[0.0, 0.5], [2, 3]]}))
    first, second = meshes(ax)
    assert first.get_coordinates()[:, 0, 1].tolist() == [-1, 0, 1]
    assert second.get_coordinates()[:, 0, 1].tolist() == [-0.5, 0, 0.5]
    assert first.norm is second.norm, "one colour bar for all"
    assert first.norm.vmax == 50


@pytest.mark.parametrize(
    ("limits", "scale"),
    [
        (np.linspace(-1, 1, 9), "linear"),
        (np.logspace(-6, 2, 9), "log"),
        (np.append(np.logspace(-6, 2, 9), INF), "log"),
        (np.concatenate([-np.logspace(2, -3, 6), [0.0], np.logspace(-3, 2, 6)]), "symlog"),
    ],
)
def test_the_axis_follows_the_bins_and_all_of_them_are_in_sight(limits: Any, scale: str) -> None:
    ax = axes()
    assert histogram(ax, series({0: np.stack([limits, np.arange(1.0, len(limits) + 1)])}))
    assert ax.get_yscale() == scale
    low, high = ax.get_ylim()
    assert low < limits[0]
    assert high >= limits[np.isfinite(limits)][-1]
    (mesh,) = meshes(ax)
    assert (np.diff(mesh.get_coordinates()[:, 0, 1]) > 0).all()


@pytest.mark.parametrize(("smallest", "largest"), [(-4, -1), (-12, 3), (-13, 3), (-3, -3), (-12.04, 3.6), (-1, 0)])
def test_ticks_to_both_sides_of_zero_are_few_and_apart(smallest: float, largest: float) -> None:
    sizes = np.logspace(smallest, largest, 20) if largest > smallest else np.array([1e-3, 0.5])
    limits = np.concatenate([-sizes[::-1], sizes, [INF]])
    ax = axes()
    assert histogram(ax, series({0: np.stack([limits, np.ones(len(limits))])}))
    ticks = np.array(ax.get_yticks())
    assert 3 <= len(ticks) <= 2 * TICKS + 1
    assert (ticks == -ticks[::-1]).all()
    assert 0 in ticks
    assert np.abs(ticks).max() <= sizes[-1]
    low, high = ax.get_ylim()
    place = ax.yaxis.get_transform().transform(ticks)
    whole = np.diff(ax.yaxis.get_transform().transform([low, high]))[0]
    assert np.diff(place).min() > 0.05 * whole


def test_edges_close_the_open_ends() -> None:
    assert closed(np.array([0.0, 1.0, 3.0])).tolist() == [-1, 0, 1, 3]
    assert closed(np.array([0.0, 1.0, 3.0, INF])).tolist() == [-1, 0, 1, 3, 5]
    assert closed(np.array([1.0, 10.0, INF]), log=True) == pytest.approx([0.1, 1, 10, 100])
    assert closed(np.array([2.0])).tolist() == [1, 2]
    assert closed(np.array([2.0, INF])).tolist() == [1, 2, 3]
    assert len(closed(np.array([INF]))) == 2


@pytest.mark.parametrize("value", [None, [[0.0, 1.0], [0, 0]], [1.0, 2.0], [[], []], 3.0])
def test_nothing_to_count_draws_nothing(value: Any) -> None:
    ax = axes()
    assert not histogram(ax, series({0: value if value is not None else "failed", 1: [[0.0], [0]]}))
    assert not meshes(ax)


def test_a_spectrum_shows_its_last_reading_and_the_first_for_comparison() -> None:
    grid = np.linspace(-1, 5, 7)
    ax = axes()
    tables = {step: np.stack([grid, np.full(7, float(step + 1))]) for step in (0, 10, 20)}
    assert spectrum(ax, series({**tables, 30: "failed"}))
    first, last = ax.lines
    assert (first.get_label(), last.get_label()) == ("step 0", "step 20")
    assert last.get_xdata().tolist() == grid.tolist()
    assert set(last.get_ydata()) == {21.0}
    assert ax.get_yscale() == "log"
    ax = axes()
    assert spectrum(ax, series({5: tables[0]}))
    assert [line.get_label() for line in ax.lines] == ["step 5"]


def test_a_spectrum_leaves_out_what_is_far_below_its_peak() -> None:
    ax = axes()
    assert spectrum(ax, series({0: [[0.0, 1.0, 2.0, 3.0], [1.0, 1e-6, 1e-300, 0.0]]}))
    assert np.isnan(ax.lines[0].get_ydata()).tolist() == [False, False, True, True]
    assert not spectrum(axes(), series({0: [[0.0, 1.0], [0.0, 0.0]], 1: "failed", 2: [[1.0], [NAN]]}))
