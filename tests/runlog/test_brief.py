"""Values in a few words: numbers are those of the array, whatever its kind."""

import math
from typing import Any

import numpy as np
import pytest

from cockpit_bench.runlog.brief import brief

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (1.23456, "scalar", "1.235"),
        (3, "", "3"),
        (NAN, "scalar", "nan"),
        ([0.5], "per-group", "0.5"),
        ([1.0, NAN, 3e-9], "per-layer", "[1 nan 3e-09]"),
        ([5.0, 1.0, 2.0, 4.0, 3.5], "per-module", "5 values, min 1, median 3.5, max 5"),
        ([5.0, NAN, 2.0, INF, 3.5], "per-layer", "5 values, min 2, median 3.5, max 5, 2 not finite"),
        ([NAN] * 5, "per-layer", "5 values, 5 not finite"),
        ([], "per-layer", "[]"),
        ([[1.0], []], "", "values of different lengths"),
        ([[1.0, 2.0]], "", "array of 1 x 2"),
        ([[0.0, 1.0, 2.0, INF], [0, 3, 4, 2]], "histogram", "9 counted in 4 bins, upper limits 1 to inf, median 2"),
        ([[0.0, 1.0], [0, 0]], "histogram", "0 counted in 2 bins"),
        ([1.0, 2.0], "histogram", "[1 2]"),
        ([[-1.0, 0.0, 8.0], [0.1, 0.7, NAN]], "spectrum", "3 points from -1 to 8, peak at 0"),
        ([[NAN, 1.0, INF], [0.5, 3, 4], [INF, 5, 0]], "grid", "12 counted in 2 x 2 bins"),
    ],
)
def test_the_words(value: Any, kind: str, text: str) -> None:
    assert brief(value, kind) == text
    assert brief(np.array(value) if text[:6] != "values" else value, kind) == text


def test_the_median_of_a_histogram_is_in_its_bin() -> None:
    numbers = np.random.default_rng(0).lognormal(size=501)
    limits = np.append(np.logspace(-2, 1, 12), INF)
    counts = np.histogram(numbers, np.concatenate([[-INF], limits]))[0]
    expected = limits[np.searchsorted(limits, np.median(numbers))]
    assert brief(np.stack([limits, counts]), "histogram").endswith(f"median {expected:.4g}")
