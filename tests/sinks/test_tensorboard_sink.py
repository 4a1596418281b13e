"""What the sink writes is what TensorBoard's own reader finds."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cockpit_bench.runlog import Event, Metrics, Outcome, Reading
from cockpit_bench.sinks import TensorBoardSink
from cockpit_bench.sinks.tensorboard import binned


def read_back(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "histograms": 0})
    accumulator.Reload()
    return accumulator


def points(accumulator: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in accumulator.Scalars(tag)]


def text(accumulator: EventAccumulator, tag: str) -> tuple[int, Any]:
    (point,) = accumulator.Tensors(tag)
    return point.step, json.loads(point.tensor_proto.string_val[0])


def test_tags_and_values(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    values = {
        "norm": 0.5,
        "count": 3,
        "pair": [1.0, 2.0],
        "eight": np.arange(8, dtype=np.float32),
        "nine": np.arange(9.0),
        "square": np.ones((2, 2)),
        "ragged": [[1.0], []],
        "zero_d": np.float32(4.0),
    }
    sink.write(Reading("gradient/norm", 7, 0.1, "ok", values, {"norm": 0.25}, {"seconds": 0.125, "products": 3.0}))
    sink.write(Reading("gradient/norm", 8, 0.2, "failed", {"norm": 9.0}, {"norm": 9.0}, {"seconds": 0.5}))
    sink.write(Reading("curvature/trace", 8, 0.2, "skipped"))
    sink.write(Metrics(8, 0.2, {"valid_accuracy": 0.75}, "evaluation"))
    sink.write(Metrics(8, 0.2, {"tokens_per_second": 10.0}, "user"))
    sink.close()
    found = read_back(tmp_path)
    assert set(found.Tags()["scalars"]) == {
        "gradient/norm/norm",
        "gradient/norm/norm_stderr",
        "gradient/norm/count",
        "gradient/norm/zero_d",
        "gradient/norm/pair/0",
        "gradient/norm/pair/1",
        *(f"gradient/norm/eight/{index}" for index in range(8)),
        "tax/gradient/norm",
        "metrics/valid_accuracy",
        "user/tokens_per_second",
    }
    assert points(found, "gradient/norm/norm") == [(7, 0.5)]
    assert points(found, "gradient/norm/norm_stderr") == [(7, 0.25)]
    assert points(found, "gradient/norm/eight/5") == [(7, 5.0)]
    assert points(found, "tax/gradient/norm") == [(8, 0.625)]
    assert points(found, "metrics/valid_accuracy") == [(8, 0.75)]


def test_non_finite_scalars_are_written_as_they_are(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    for step, value in enumerate((math.nan, math.inf, -math.inf)):
        sink.write(Reading("batch/loss", step, 0.0, "ok", {"loss": value}))
    sink.close()
    found = [value for _, value in points(read_back(tmp_path), "batch/loss/loss")]
    assert found == pytest.approx([math.nan, math.inf, -math.inf], nan_ok=True)


def test_events_are_texts(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.write(Event(5, 0.5, "retired", {"instrument": "my/own", "loss": math.nan}))
    sink.write(Outcome("miss", 9, 0.9, None, None, 0.5, "out of steps", {}, 1.0, {}))
    sink.close()
    found = read_back(tmp_path)
    assert text(found, "events/retired/text_summary") == (5, {"instrument": "my/own", "loss": "NaN"})
    assert text(found, "events/outcome/text_summary") == (9, {"status": "miss", "reason": "out of steps"})


def test_an_evaluation_puts_all_so_far_on_disk(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    flushed: list[None] = []
    flush = sink._writer.flush
    sink._writer.flush = lambda: (flushed.append(None), flush())
    sink.write(Reading("batch/loss", 1, 0.0, "ok", {"loss": 1.0}))
    sink.write(Metrics(1, 0.0, {"x": 1.0}, "user"))
    assert flushed == []
    sink.write(Metrics(1, 0.0, {"valid_accuracy": 0.5}, "evaluation"))
    assert flushed == [None]
    assert points(read_back(tmp_path), "batch/loss/loss") == [(1, 1.0)]
    sink.close()


def test_resuming_purges_what_is_taken_back(tmp_path: Path) -> None:
    for steps, purge in ((range(10), None), (range(6, 9), 6)):
        sink = TensorBoardSink(tmp_path, purge_step=purge)
        for step in steps:
            sink.write(Reading("batch/loss", step, 0.0, "ok", {"loss": float(purge or 0)}))
        sink.close()
    expected = [(step, 0.0) for step in range(6)] + [(step, 6.0) for step in range(6, 9)]
    assert points(read_back(tmp_path), "batch/loss/loss") == expected


LAYERS = ["conv.weight", "conv.bias", "head.weight"]


def declaring(**kinds: str) -> dict[str, Any]:
    return {
        "instruments": {"mine/all": {"outputs": {name.replace("_", "-"): {"kind": k} for name, k in kinds.items()}}}
    }


def write(
    folder: Path, about: dict[str, Any], *values: dict[str, Any], layers: list[str] | None, **settings: Any
) -> Any:
    sink = TensorBoardSink(folder, about=about, **settings)
    if layers is not None:
        sink.write(Event(0, 0.0, "layers", {"names": layers, "sizes": [1] * len(layers)}))
    for step, value in enumerate(values):
        sink.write(Reading("mine/all", step, 0.0, "ok", value))
    sink.close()
    return read_back(folder)


def scalars(found: EventAccumulator) -> set[str]:
    return set(found.Tags()["scalars"])


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


def test_what_does_not_fit_its_kind_and_spectra_are_left_to_the_log(tmp_path: Path) -> None:
    about = declaring(counts="histogram", density="spectrum", layer="per-layer")
    odd: list[dict[str, Any]] = [
        {"counts": [[0.0, 1.0], [0, 0]], "density": [[0.0, 1.0], [1.0, 2.0]], "layer": [[1.0]]},
        {"counts": [[0.0, 1.0], [math.nan, 1]], "layer": "text"},
        {"counts": [1.0, 2.0], "layer": 3.0},
    ]
    found = write(tmp_path, about, *odd, layers=LAYERS)
    assert scalars(found) == set()
    assert found.Tags()["histograms"] == []


def test_no_edge_is_no_point(tmp_path: Path) -> None:
    label = "curvature/sharpness"
    about = {"instruments": {label: {"outputs": {"sharpness": {"kind": "scalar"}, "edge": {"kind": "scalar"}}}}}
    sink = TensorBoardSink(tmp_path, about=about)
    for step, edge in enumerate((20.0, math.nan, 10.0)):
        sink.write(Reading(label, step, 0.0, "ok", {"sharpness": math.nan, "edge": edge}))
    sink.close()
    found = read_back(tmp_path)
    assert points(found, f"{label}/edge") == [(0, 20.0), (2, 10.0)]
    assert len(points(found, f"{label}/sharpness")) == 3
    assert charts(found)["sharpness and its edge"] == [f"{label}/sharpness$", f"{label}/edge$"]


def charts(found: EventAccumulator) -> dict[str, list[str]]:
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    (layout,) = found.Tensors("custom_scalars__config__")
    category = Layout.FromString(layout.tensor_proto.string_val[0]).category[0]
    return {chart.title: list(chart.multiline.tag) for chart in category.chart}


def test_the_layers_of_an_output_have_one_chart(tmp_path: Path) -> None:
    found = write(tmp_path, declaring(layer="per-layer", whole="scalar"), {"layer": [1.0]}, layers=None)
    assert charts(found) == {
        "mine/all/layer": ["mine/all/layer/.*"],
        "seconds of observation by instrument": ["tax/.*"],
    }


ABOUT = {
    "target": {"metric": "valid_accuracy", "value": 0.9, "direction": "at_least"},
    "instruments": {"curvature/preconditioned_sharpness": {}, "gradient/norm": {}},
}


def test_custom_charts_have_their_lines(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path, about=ABOUT)
    sink.write(Metrics(8, 0.2, {"valid_accuracy": 0.75}, "evaluation"))
    sink.close()
    found = read_back(tmp_path)
    assert points(found, "edges/rho") == [(8, 1.0)]
    assert points(found, "edges/target") == [(8, pytest.approx(0.9))]
    tags = [tag for chart in charts(found).values() for tag in chart]
    assert tags == [
        "curvature/preconditioned_sharpness/rho$", "edges/rho", "metrics/valid_accuracy$", "edges/target", "tax/.*",
    ]  # fmt: skip


def test_a_run_without_target_and_instruments_has_no_charts(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path, about={"target": None, "instruments": {}})
    sink.write(Metrics(8, 0.2, {"valid_accuracy": 0.75}, "evaluation"))
    sink.close()
    assert set(read_back(tmp_path).Tags()["scalars"]) == {"metrics/valid_accuracy"}


def test_the_trial_is_a_table_and_its_outcome_has_hyperparameters(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    trial = {"workload": "quadratic", "seed": 0, "hyperparameters": {"lr": 0.1, "betas": [0.9, 0.99]}}
    sink.write(Event(0, 0.0, "trial", trial))
    sink.write(Outcome("hit", 5, 0.5, 3, 0.3, 0.95, "", {}, 0.5, {}))
    sink.close()
    assert len(list(tmp_path.iterdir())) == 1, "one event file, no second run in a sub-folder"
    found = read_back(tmp_path)
    (table,) = found.Tensors("trial/text_summary")
    assert b"| hyperparameters.lr | 0.1 |" in table.tensor_proto.string_val[0]
    assert points(found, "outcome/hit_step") == [(5, 3.0)]
    metadata = found.SummaryMetadata("_hparams_/session_start_info")
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    values = HParamsPluginData.FromString(metadata.plugin_data.content).session_start_info.hparams
    assert values["hyperparameters.lr"].number_value == 0.1
    assert values["outcome"].string_value == "hit"
