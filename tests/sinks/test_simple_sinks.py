"""Log, memory and callback."""

from pathlib import Path

import pytest

from cockpit_bench.runlog import Event, LogWriter, Metrics, Reading, Record, new_header, read_run
from cockpit_bench.sinks import CallbackSink, JsonlSink, MemorySink, Sink


def reading(step: int, status: str = "ok") -> Reading:
    return Reading("gradient/norm", step, float(step), status, {"norm": float(step)})


def test_a_sink_is_abstract() -> None:
    with pytest.raises(TypeError):
        Sink()


def test_jsonl_writes_the_log(tmp_path: Path) -> None:
    sink = JsonlSink(LogWriter(tmp_path / "log.jsonl", new_header("x")))
    records: list[Record] = [reading(0), Metrics(0, 0.0, {"loss": 1.0}, "user"), Event(0, 0.0, "clip")]
    for record in records:
        sink.write(record)
    sink.close()
    sink.close()
    assert list(read_run(tmp_path).records) == records


def test_jsonl_replaces_what_has_no_spelling(tmp_path: Path) -> None:
    sink = JsonlSink(LogWriter(tmp_path / "log.jsonl", new_header("x")))
    sink.write(Reading("my/own", 4, 2.0, "ok", {"odd": object()}))
    sink.write(Metrics(5, 2.5, {"odd": "1"}, "user"))
    sink.write(reading(6))
    sink.close()
    run = read_run(tmp_path)
    assert [(event.step, event.name, event.detail["record"]) for event in run.events] == [
        (4, "unwritable_record", "my/own"),
        (5, "unwritable_record", "Metrics"),
    ]
    assert "reading field 'values'" in run.events[0].detail["error"]
    assert run["gradient/norm"]["norm"].steps.tolist() == [6]


def test_memory_keeps_all_or_the_last(tmp_path: Path) -> None:
    everything, last = MemorySink(), MemorySink(limit=2)
    for sink in (everything, last):
        for step in range(4):
            sink.write(reading(step))
        sink.close()
    assert everything.records == [reading(step) for step in range(4)]
    assert last.records == [reading(2), reading(3)]


def test_latest_is_the_last_reading_that_was_ok() -> None:
    sink = MemorySink(limit=1)
    for record in (reading(1), reading(2), reading(3, "failed"), Event(3, 3.0, "clip")):
        sink.write(record)
    assert dict(sink.latest) == {"gradient/norm": {"norm": 2.0}}


def test_callback_gets_every_record() -> None:
    seen: list[Record] = []
    sink = CallbackSink(seen.append)
    sink.write(reading(1))
    sink.close()
    assert seen == [reading(1)]
