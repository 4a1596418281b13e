"""What the sink writes is what TensorBoard's own reader finds."""

import math
from pathlib import Path

import numpy as np
import pytest
from event_files import charts, points, read_back, text

from cockpit_bench.runlog import Event, Metrics, Outcome, Reading
from cockpit_bench.sinks import TensorBoardSink


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
