"""A run folder read back as series."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cockpit_bench.runlog import Event, LogWriter, Metrics, Outcome, Reading, Record, RunFolder, new_header, read_run

SHARP = "curvature/sharpness"
OUTCOME = Outcome("hit", 30, 3.0, 20, 2.0, 0.98, "", {"forward": 2.0}, 4.0, {SHARP: 0.1})
RECORDS: tuple[Record, ...] = (
    Reading(SHARP, 0, 0.0, "ok", {"top": 5.0, "spectrum": [5.0, 1.0], "ragged": [[1.0], []]}, {"top": 0.5}),
    Reading(SHARP, 10, 1.0, "skipped", reason="over budget"),
    Metrics(10, 1.0, {"valid_accuracy": 0.5}, "evaluation"),
    Reading(SHARP, 20, 2.0, "ok", {"top": 7, "spectrum": np.arange(20.0), "late": 1.0}),
    Reading(SHARP, 30, 3.0, "failed", {"top": 99.0}, {"top": 1.0}, reason="no convergence"),
    Reading("gradient/norm", 30, 3.0, "skipped"),
    Metrics(30, 3.0, {"valid_accuracy": 0.98}, "evaluation"),
    Metrics(30, 3.0, {"tokens_per_second": 7.0}, "user"),
    Event(20, 2.0, "target_hit"),
    OUTCOME,
)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder.create(tmp_path / "run", resume=False)
    writer = LogWriter(made.log_path, new_header("mine"))
    for record in RECORDS:
        writer.write(record)
    writer.close()
    return made


def test_a_scalar_output(folder: RunFolder) -> None:
    series = read_run(folder.path)[SHARP]["top"]
    assert series.steps.tolist() == [0, 10, 20, 30]
    assert series.seconds.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert series.status.tolist() == ["ok", "skipped", "ok", "failed"]
    np.testing.assert_array_equal(series.values, [5.0, np.nan, 7.0, np.nan])
    np.testing.assert_array_equal(series.stderr, [0.5, np.nan, np.nan, 1.0])
    assert len(series) == 4


def test_an_array_output(folder: RunFolder) -> None:
    values = read_run(folder.path)[SHARP]["spectrum"].values
    assert isinstance(values, list)
    assert [None if value is None else value.tolist() for value in values] == [
        [5.0, 1.0],
        None,
        np.arange(20.0).tolist(),
        None,
    ]
    assert read_run(folder.path)[SHARP]["ragged"].values == [[[1.0], []], None, None, None]


def test_an_output_that_appears_later(folder: RunFolder) -> None:
    np.testing.assert_array_equal(read_run(folder.path)[SHARP]["late"].values, [np.nan, np.nan, 1.0, np.nan])


def test_mappings(folder: RunFolder) -> None:
    run = read_run(folder.path)
    assert run.instruments == tuple(run) == (SHARP, "gradient/norm")
    assert list(run[SHARP]) == ["top", "spectrum", "ragged", "late"]
    assert run[SHARP].readings[1].reason == "over budget"
    assert list(run["gradient/norm"]) == []
    assert len(run["gradient/norm"].readings) == 1
    assert (len(run), len(run[SHARP]), len(run.metrics)) == (2, 4, 2)
    assert "gradient/noise" not in run
    assert list(run.metrics) == ["valid_accuracy", "tokens_per_second"]
    assert run.metrics["valid_accuracy"].values == pytest.approx([0.5, 0.98])
    assert run.metrics["valid_accuracy"].status.tolist() == ["ok", "ok"]
    assert run.events == [Event(20, 2.0, "target_hit")]
    assert run.outcome == OUTCOME
    assert run.header is not None
    assert run.header.run == "mine"


@pytest.mark.parametrize(
    ("look", "words"),
    [
        (lambda run: run["curvature/sharpnes"], "no instrument.*nearest: curvature/sharpness"),
        (lambda run: run[SHARP]["tip"], "no output of curvature/sharpness.*nearest: top"),
        (lambda run: run.metrics["valid_acuracy"], "no metric.*nearest: valid_accuracy"),
        (lambda run: run["zzz"], "this run has: curvature/sharpness, gradient/norm"),
        (lambda run: run["gradient/norm"]["norm"], "this run has: none"),
    ],
)
def test_unknown_names_name_the_nearest(folder: RunFolder, look: object, words: str) -> None:
    with pytest.raises(KeyError, match=words):
        look(read_run(folder.path))


def test_the_files_beside_the_log(folder: RunFolder) -> None:
    assert read_run(folder.path).trial == {}
    assert read_run(folder.path).status == {}
    folder.write_text("trial.toml", 'seed = 3\n[workload]\nname = "digits_mlp"\n')
    folder.write_status({"state": "running", "best": float("inf"), "note": "NaN"})
    folder.write_environment({"host": "here"})
    run = read_run(folder.path)
    assert run.trial == {"seed": 3, "workload": {"name": "digits_mlp"}}
    assert run.status == {"state": "running", "best": float("inf"), "note": "NaN"}
    assert run.environment == {"host": "here"}


@pytest.mark.parametrize(("name", "text"), [("trial.toml", "= 3"), ("status.json", "{"), ("env.json", "[1]")])
def test_a_broken_file_is_named(folder: RunFolder, name: str, text: str) -> None:
    folder.write_text(name, text)
    with pytest.raises(ValueError, match=f"{name}.*mend or delete"):
        read_run(folder.path)


def test_places_without_a_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, found in (("missing", "nothing there"), ("empty", "a folder without it"), ("file", "a file")):
        with pytest.raises(FileNotFoundError, match=rf"log\.jsonl at .*{name}, got {found}; pass the logdir"):
            read_run(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"{torn", b"some other\nprogram's log\n"])
def test_a_log_without_anything(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "log.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match="expected records"):
        read_run(tmp_path)


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    LogWriter(tmp_path / "log.jsonl", new_header("x")).close()
    run = read_run(tmp_path)
    assert (len(run), run.outcome, run.events) == (0, None, [])


def test_nothing_here_imports_torch() -> None:
    code = (
        "import sys, cockpit_bench.runlog, cockpit_bench.sinks, cockpit_bench.clock, cockpit_bench.cadence\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
