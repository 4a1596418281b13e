"""Every kind of output has its form in TensorBoard: layers and modules by name, histograms as they were binned."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from event_files import charts, declaring, points, read_back, scalars, write

from cockpit_bench.runlog import Reading
from cockpit_bench.sinks import TensorBoardSink
from cockpit_bench.sinks.tensorboard import binned

LAYERS = ["conv.weight", "conv.bias", "head.weight"]


def test_layers_are_tagged_by_name_and_groups_by_number(tmp_path: Path) -> None:
    about = declaring(layer="per-layer", group="per-group")
    values = {"layer": np.array([1.0, math.nan, 3.0]), "group": [0.1] * 12}
    found = write(tmp_path, about, values, layers=LAYERS)
    groups = {f"mine/all/group/{index}" for index in range(12)}
    assert scalars(found) == {f"mine/all/layer/{name}" for name in LAYERS} | groups
    assert points(found, "mine/all/layer/head.weight") == [(0, 3.0)]
    assert math.isnan(points(found, "mine/all/layer/conv.bias")[0][1])
    assert not any(tag.startswith("notes") for tag in found.Tags()["tensors"])


@pytest.mark.parametrize("layers", [None, LAYERS[:2]])
def test_layers_without_fitting_names_have_numbers(tmp_path: Path, layers: list[str] | None) -> None:
    found = write(tmp_path, declaring(layer="per-layer"), {"layer": [1.0, 2.0, 3.0]}, layers=layers)
    assert scalars(found) == {"mine/all/layer/0", "mine/all/layer/1", "mine/all/layer/2"}


def test_too_many_layers_are_sent_as_extremes_and_said_once(tmp_path: Path) -> None:
    about = declaring(layer="per-layer", other="per-layer")
    many = np.arange(41.0)
    silent = np.full(41, math.nan)
    gap = np.where(many == 0, math.nan, many)
    found = write(tmp_path, about, {"layer": many, "other": many}, {"layer": silent}, {"layer": gap}, layers=None)
    assert scalars(found) == {
        f"mine/all/{name}/{how}" for name in ("layer", "other") for how in ("min", "median", "max")
    }
    assert points(found, "mine/all/layer/max") == [(0, 40.0), (1, pytest.approx(math.nan, nan_ok=True)), (2, 40.0)]
    assert [value for _, value in points(found, "mine/all/layer/min")] == pytest.approx([0, math.nan, 1], nan_ok=True)
    assert [value for _, value in points(found, "mine/all/layer/median")][::2] == [20.0, 20.5]
    (note,) = found.Tensors("notes/entries/text_summary")
    assert b"`mine/all/layer` has 41 entries, more than the 40" in note.tensor_proto.string_val[0]


def test_the_cap_is_a_setting(tmp_path: Path) -> None:
    about = declaring(layer="per-layer")
    found = write(tmp_path / "at", about, {"layer": [1.0, 2.0, 4.0]}, layers=LAYERS, most_entries=3)
    assert len(scalars(found)) == 3
    assert "mine/all/layer/conv.bias" in scalars(found)
    found = write(tmp_path / "over", about, {"layer": [1.0, 2.0, 4.0]}, layers=LAYERS, most_entries=2)
    assert points(found, "mine/all/layer/median") == [(0, 2.0)]


MODULES = ["conv", "relu", "head"]


def per_module(folder: Path, *values: tuple[Any, Any], **settings: Any) -> Any:
    sink = TensorBoardSink(folder, about=declaring(rms="per-module"), **settings)
    for step, (names, value) in enumerate(values):
        sink.write(Reading("mine/all", step, 0.0, "ok", {"rms": value}, provenance={"modules": names}))
    sink.close()
    return read_back(folder)


def test_modules_are_tagged_by_the_names_of_their_reading(tmp_path: Path) -> None:
    found = per_module(tmp_path, (MODULES, [1.0, 2.0, 3.0]), (MODULES[1:], [4.0, 5.0]), (MODULES, [6.0]))
    assert scalars(found) == {f"mine/all/rms/{name}" for name in (*MODULES, "0")}
    assert points(found, "mine/all/rms/conv") == [(0, 1.0)]
    assert points(found, "mine/all/rms/head") == [(0, 3.0), (1, 5.0)]
    assert points(found, "mine/all/rms/0") == [(2, 6.0)], "names that do not fit give way to numbers"
    assert charts(found)["mine/all/rms"] == ["mine/all/rms/.*"]


def test_many_modules_are_sent_as_extremes(tmp_path: Path) -> None:
    found = per_module(tmp_path, (MODULES, [1.0, 5.0, 3.0]), most_entries=2)
    assert scalars(found) == {f"mine/all/rms/{how}" for how in ("min", "median", "max")}
    assert points(found, "mine/all/rms/median") == [(0, 3.0)]


def test_histograms_are_sent_as_they_were_binned(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).normal(size=1000)
    limits = np.append(np.linspace(-2, 2, 9), math.inf)
    counts = np.histogram(numbers, np.concatenate([[-math.inf], limits]))[0]
    about = declaring(counts="histogram")
    found = write(tmp_path, about, {"counts": np.stack([limits, counts])}, layers=None)
    assert scalars(found) == set()
    (histogram,) = found.Histograms("mine/all/counts")
    value = histogram.histogram_value
    assert value.bucket == counts.tolist()
    assert value.bucket_limit == [*limits[:-1], 2.5]
    assert (value.min, value.max, value.num) == (-2.5, 2.5, 1000)
    assert value.sum == pytest.approx(numbers.sum(), abs=1000 * 0.25)
    assert value.sum_squares == pytest.approx(np.square(numbers).sum(), rel=0.1)


def test_tensorboard_finds_every_bin_where_it_belongs(tmp_path: Path) -> None:
    """Through TensorBoard's own conversion to (left, right, count), which drops empty bins at the ends."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    write(tmp_path, declaring(counts="histogram"), {"counts": [[0.0, 1.0, 3.0, 4.0], [0, 2, 0, 5]]}, layers=None)
    (file,) = tmp_path.iterdir()
    found = [value for event in EventFileLoader(str(file)).Load() for value in event.summary.value]
    (table,) = [make_ndarray(value.tensor).tolist() for value in found if value.tag == "mine/all/counts"]
    assert table == [[0, 1, 2], [1, 3, 0], [3, 4, 5]]


@pytest.mark.parametrize(
    ("limits", "counts", "edges"),
    [
        ([0.0, 1.0, 3.0], [1, 1, 1], [-1, 3]),
        ([0.0, 1.0, 3.0, math.inf], [1, 1, 1, 1], [-1, 5]),
        ([2.0], [4], [1, 2]),
        ([2.0, math.inf], [4, 4], [1, 3]),
        ([0.0, 1.0, 2.0], [0, 7, 0], [0, 1]),
    ],
)
def test_the_ends_of_a_histogram(limits: list[float], counts: list[int], edges: list[float]) -> None:
    found = binned(np.array(limits), np.array(counts, dtype=float))
    assert [found["min"], found["max"]] == edges
    assert len(found["bucket_limits"]) == len(found["bucket_counts"]) == len(limits)
    assert np.isfinite(found["bucket_limits"]).all()


def test_what_does_not_fit_its_kind_spectra_and_grids_are_left_to_the_log(tmp_path: Path) -> None:
    about = declaring(counts="histogram", density="spectrum", layer="per-layer", joint="grid")
    odd: list[dict[str, Any]] = [
        {"counts": [[0.0, 1.0], [0, 0]], "density": [[0.0, 1.0], [1.0, 2.0]], "layer": [[1.0]]},
        {"counts": [[0.0, 1.0], [math.nan, 1]], "layer": "text"},
        {"counts": [1.0, 2.0], "layer": 3.0, "joint": [[math.nan, 1.0], [1.0, 2.0]]},
        {"joint": [1.0, 2.0]},
    ]
    found = write(tmp_path, about, *odd, layers=LAYERS)
    assert scalars(found) == set()
    assert found.Tags()["histograms"] == []


def test_the_layers_of_an_output_have_one_chart(tmp_path: Path) -> None:
    found = write(tmp_path, declaring(layer="per-layer", whole="scalar"), {"layer": [1.0]}, layers=None)
    assert charts(found) == {
        "mine/all/layer": ["mine/all/layer/.*"],
        "seconds of observation by instrument": ["tax/.*"],
    }
