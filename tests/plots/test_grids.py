"""A joint histogram: what is drawn is what was counted, at its limits, with its marginals."""

from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from cockpit_bench.plots.grids import grid
from cockpit_bench.runlog import Reading
from cockpit_bench.runlog.run import Readings

INF, NAN = float("inf"), float("nan")
ACROSS, UP = [0.0, 1.0, INF], [-1.0, -0.001, 0.001, 1.0, INF]
COUNTS = np.array([[1, 0, 2], [0, 0, 0], [3, 100, 0], [4, 0, 0], [0, 0, 5]])


def table(counts: Any, across: Any = ACROSS, up: Any = UP) -> Any:
    return np.block([[np.array([[NAN]]), np.array([across])], [np.array([up]).T, np.asarray(counts, dtype=float)]])


def series(*values: Any) -> Any:
    taken = [
        Reading("a/b", 10 * at, 0.0, "failed") if value is None else Reading("a/b", 10 * at, 0.0, "ok", {"out": value})
        for at, value in enumerate(values)
    ]
    return Readings("a/b", taken)["out"]


def drawn(values: Any, marginals: Any = None) -> Any:
    ax = Figure().subplots()
    assert grid(ax, values, marginals or {})
    return ax


def mesh_of(ax: Any) -> Any:
    (mesh,) = [drawn for drawn in ax.collections if type(drawn).__name__ == "QuadMesh"]
    return mesh


def test_the_last_reading_with_counts_is_drawn_at_its_limits() -> None:
    ax = drawn(series(table(7 * COUNTS), table(COUNTS), table(0 * COUNTS), None))
    mesh = mesh_of(ax)
    corners = mesh.get_coordinates()
    assert corners[0, :, 0].tolist() == [-1, 0, 1, 2]
    assert corners[:, 0, 1].tolist() == pytest.approx([-1.999, -1, -0.001, 0.001, 1, 1.999])
    assert mesh.get_array().filled(0).tolist() == COUNTS.tolist()
    assert mesh.get_array().mask.tolist() == (COUNTS == 0).tolist()
    assert (mesh.norm.vmin, mesh.norm.vmax) == (1, 100)
    assert (ax.get_xscale(), ax.get_yscale()) == ("linear", "symlog")
    assert "step 10" in [text.get_text() for text in ax.texts]


def test_marginals_are_sums() -> None:
    above, right = drawn(series(table(COUNTS))).child_axes
    (across,), (up,) = above.patches, right.patches
    assert across.get_data().values.tolist() == [8, 100, 7]
    assert up.get_data().values.tolist() == [3, 0, 103, 4, 5]
    assert across.get_data().edges.tolist() == [-1, 0, 1, 2]


def test_axes_are_called_after_the_marginals_of_that_reading() -> None:
    others = {
        "values": series([UP, COUNTS.sum(1)], None),
        "old": series([ACROSS[:2], [1, 1]], None),
        "gradient": series([ACROSS, COUNTS.sum(0)], None),
        "whole": series(3.0, None),
    }
    ax = drawn(series(table(COUNTS), None), others)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("gradient", "values")
    ax = drawn(series(table(COUNTS)), {"old": others["old"]})
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("across", "up")


@pytest.mark.parametrize(("limits", "scale"), [([1.0, 1e3, 1e6], "log"), ([1.0, 2.0, 4.0], "linear")])
def test_axes_follow_their_limits(limits: Any, scale: str) -> None:
    ax = drawn(series(table(COUNTS, across=limits)))
    assert ax.get_xscale() == scale
    assert (np.diff(mesh_of(ax).get_coordinates()[0, :, 0]) > 0).all()


@pytest.mark.parametrize("value", [None, table(0 * COUNTS), [[1.0, 2.0]], [1.0, 2.0], 3.0, [[NAN]]])
def test_nothing_to_count_draws_nothing(value: Any) -> None:
    ax = Figure().subplots()
    assert not grid(ax, series(value, [[NAN, 1.0], [1.0, 0.0]]), {})
    assert not ax.collections
