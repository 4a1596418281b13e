"""Processes that train together: one run folder, written by rank 0; all of them read."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from loop_cases import CASES, Training
from watching import readings, watch

from cockpit_bench import Cockpit, read_run
from cockpit_bench.panels import PANELS
from cockpit_bench.ranks import Process, this_process

PROGRAM = Path(__file__).with_name("user_ranks.py")


def both(folder: Path) -> list[tuple[dict[str, Any], str]]:
    """What two processes with one logdir say on stdout and stderr."""
    command = [sys.executable, str(PROGRAM)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(folder / "store"), str(folder / "run")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    return [(json.loads(out), err) for out, err in said]


def test_one_logdir_for_two_processes(tmp_path: Path) -> None:
    (first, first_err), (second, second_err) = both(tmp_path)
    folder = tmp_path / "run"
    run = read_run(folder)
    assert run.header is not None
    assert run.header.extra["process"] == {"rank": 0, "count": 2}
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum('"kind":"header"' in line for line in lines) == 1
    assert run.bad_lines == 0
    assert {label: [r.step for r in run[label].readings] for label in run} == {
        label: [0, 1, 2] for label in PANELS["standard"]
    }
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1
    assert (folder / "checkpoints" / "last.pt").exists()
    for said in (first, second):
        assert (said["ok"], said["status"], said["prices"]) == (
            3 * len(PANELS["standard"]),
            "done",
            len(PANELS["standard"]),
        )
    assert first["weights"] == second["weights"]
    assert f"log      {folder}" in first_err
    assert "step" not in second_err
    assert "done" not in second_err


def test_another_rank_writes_nothing_and_hears_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    training = Training(CASES[0])
    watch(training, logdir=tmp_path / "run", panel="light").close()
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    monkeypatch.setenv("RANK", "1")
    heard: list[Any] = []
    for resume in (False, True):
        cockpit = Cockpit(training.model, training.optimizers, loss=CASES[0].loss, logdir=tmp_path / "run",
                          resume=resume, panel="light", budget=None, sinks=[heard.append])  # fmt: skip
        training.run(2, cockpit.observe)
        cockpit.write_text("notes.txt", "of rank 1")
        assert len(readings(cockpit, "gradient/norm", "ok")) == 2
        assert cockpit.plot() is not None
        cockpit.close()
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    assert heard == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("variables", "process"),
    [
        ({}, Process(0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, Process(3, 4)),
        ({"RANK": "3"}, Process(0, 1)),
        ({"RANK": "", "WORLD_SIZE": "4"}, Process(0, 1)),
        ({"RANK": "4", "WORLD_SIZE": "4"}, Process(0, 1)),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, Process(0, 1)),
    ],
)
def test_ranks_from_the_environment(variables: dict[str, str], process: Process) -> None:
    assert this_process(variables) == process


def test_a_program_that_trains_alone_says_so(tmp_path: Path) -> None:
    watch(Training(CASES[0]), logdir=tmp_path / "run").close()
    header = read_run(tmp_path / "run").header
    assert header is not None
    assert header.extra["process"] == {"rank": 0, "count": 1}
