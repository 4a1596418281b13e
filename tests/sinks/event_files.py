"""Writing records through the TensorBoard sink, and reading them back with TensorBoard's own reader."""

import json
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cockpit_bench.runlog import Event, Reading
from cockpit_bench.sinks import TensorBoardSink


def read_back(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "histograms": 0})
    accumulator.Reload()
    return accumulator


def points(accumulator: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in accumulator.Scalars(tag)]


def text(accumulator: EventAccumulator, tag: str) -> tuple[int, Any]:
    (point,) = accumulator.Tensors(tag)
    return point.step, json.loads(point.tensor_proto.string_val[0])


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


def charts(found: EventAccumulator) -> dict[str, list[str]]:
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    (layout,) = found.Tensors("custom_scalars__config__")
    category = Layout.FromString(layout.tensor_proto.string_val[0]).category[0]
    return {chart.title: list(chart.multiline.tag) for chart in category.chart}
