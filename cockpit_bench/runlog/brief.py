"""A value of any kind in a few words, for tables and terminals."""

from typing import Any

import numpy as np
import numpy.typing as npt

FEW = 4  # entries that are listed one by one
Floats = npt.NDArray[np.float64]


def brief(value: Any, kind: str = "") -> str:
    """A number in four digits, a few of them one by one, and of more the range and the median.

    A histogram is the number of what was counted and the upper limits of the outermost bins that are not empty and of
    the bin with the median; a spectrum its range and its peak; a grid its counts and its size. What has not the shape
    of its kind is told by its own shape.
    """
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        return "values of different lengths"
    if kind in ("histogram", "spectrum") and array.ndim == 2 and array.shape[0] == 2 and array.shape[1]:
        return _histogram(*array) if kind == "histogram" else _spectrum(*array)
    if kind == "grid" and array.ndim == 2 and min(array.shape) > 1:
        return f"{np.nansum(array[1:, 1:]):.6g} counted in {array.shape[0] - 1} x {array.shape[1] - 1} bins"
    if array.ndim > 1:
        return "array of " + " x ".join(map(str, array.shape))
    return _vector(array) if array.ndim else f"{float(array):.4g}"


def _vector(values_L: Floats) -> str:
    if len(values_L) <= FEW:
        return f"{values_L[0]:.4g}" if len(values_L) == 1 else "[" + " ".join(f"{v:.4g}" for v in values_L) + "]"
    finite = values_L[np.isfinite(values_L)]
    odd = f", {len(values_L) - len(finite)} not finite" if len(finite) < len(values_L) else ""
    if not len(finite):
        return f"{len(values_L)} values{odd}"
    low, median, high = finite.min(), np.median(finite), finite.max()
    return f"{len(values_L)} values, min {low:.4g}, median {median:.4g}, max {high:.4g}{odd}"


def _histogram(limits_K: Floats, counts_K: Floats) -> str:
    counts_K = np.nan_to_num(counts_K)
    total = counts_K.sum()
    text = f"{total:.6g} counted in {len(limits_K)} bins"
    filled = np.flatnonzero(counts_K > 0)
    if not len(filled):
        return text
    median = limits_K[np.searchsorted(np.cumsum(counts_K), total / 2)]
    return f"{text}, upper limits {limits_K[filled[0]]:.4g} to {limits_K[filled[-1]]:.4g}, median {median:.4g}"


def _spectrum(grid_K: Floats, density_K: Floats) -> str:
    peak = grid_K[np.argmax(np.nan_to_num(density_K))]
    return f"{len(grid_K)} points from {grid_K[0]:.4g} to {grid_K[-1]:.4g}, peak at {peak:.4g}"
