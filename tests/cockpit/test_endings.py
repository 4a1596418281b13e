"""How runs end: whatever it is, the outcome is in the log and the log can be read."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_cases import CASES, Training
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from watching import events, readings, watch

from cockpit_bench import Metrics, Outcome, at_least, read_run
from cockpit_bench.sinks import TensorBoardSink

PLAIN = CASES[0]
LOOP = Path(__file__).with_name("user_loop.py")


def outcome_of(folder: Path) -> Outcome:
    outcome = read_run(folder).outcome
    assert outcome is not None
    return outcome


def log_is_intact(folder: Path, steps: int) -> None:
    run = read_run(folder)
    assert run.bad_lines == 0
    assert [r.step for r in run["gradient/norm"].readings] == list(range(steps))
    assert run.status["state"] == "finished"
    assert [r for r in run.records if isinstance(r, Outcome)] == [run.records[-1]]


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ZeroDivisionError("the user's own"), "error", "ZeroDivisionError: the user's own"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
        (torch.OutOfMemoryError("too big"), "out_of_memory", "OutOfMemoryError: too big"),
        (MemoryError(), "out_of_memory", "MemoryError: "),
        (SystemExit(3), "error", "SystemExit: 3"),
        (SystemExit(0), "done", ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_exception_inside_with_is_the_outcome(tmp_path: Path, error: Any, status: str, reason: str) -> None:
    training = Training(PLAIN)

    def loop() -> None:
        with watch(training, logdir=tmp_path / "run") as cockpit:
            training.run(3, cockpit.observe)
            raise error

    with pytest.raises(type(error)):
        loop()
    outcome = outcome_of(tmp_path / "run")
    assert (outcome.status, outcome.reason, outcome.step) == (status, reason, 3)
    log_is_intact(tmp_path / "run", 3)


@pytest.mark.parametrize("where", ["before the step", "in the data", "in the evaluation"])
def test_an_exception_anywhere_in_the_loop(tmp_path: Path, where: str) -> None:
    training = Training(PLAIN)

    def loader() -> Any:
        yield from range(3)
        if where == "in the data":
            raise OSError("no such file")

    def loop() -> None:
        with watch(training, logdir=tmp_path / "run") as cockpit:
            for step in cockpit.batches(loader()):
                cockpit.observe(*training.backward(step))
                if where == "before the step" and step == 2:
                    raise OSError("no such file")
                training.take_step()
            with cockpit.evaluating():
                raise OSError("no such file")

    with pytest.raises(OSError, match="no such file"):
        loop()
    outcome = outcome_of(tmp_path / "run")
    assert (outcome.status, outcome.step) == ("error", 2 if where == "before the step" else 3)
    assert sum(outcome.buckets.values()) == pytest.approx(outcome.wall)
    log_is_intact(tmp_path / "run", 3)


def user_program(folder: Path, ending: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(LOOP), str(folder), ending]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("ending", "status", "reason", "code"),
    [("raises", "error", "ValueError: the user's own", 1), ("returns", "done", "", 0)],
)
def test_a_program_that_never_closes(tmp_path: Path, ending: str, status: str, reason: str, code: int) -> None:
    program = user_program(tmp_path / "run", ending)
    _, said = program.communicate(timeout=60)
    assert program.returncode == code, said
    outcome = outcome_of(tmp_path / "run")
    assert (outcome.status, outcome.reason, outcome.step) == (status, reason, 5)
    log_is_intact(tmp_path / "run", 5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_leaves_the_run_to_its_parent(tmp_path: Path) -> None:
    """It trains on and exits, and neither waits for the threads of the sinks nor writes into the folder."""
    folder = tmp_path / "run"
    program = user_program(folder, "forks")
    _, said = program.communicate(timeout=60)
    assert program.returncode == 0, said
    log_is_intact(folder, 7)
    assert not [r for r in read_run(folder).records if isinstance(r, Metrics) or getattr(r, "name", "") == "hello"]
    assert not (folder / "note.txt").exists()
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize("ending", ["waits", "waits in with"])
def test_control_c(tmp_path: Path, ending: str) -> None:
    program = user_program(tmp_path / "run", ending)
    assert program.stdout is not None
    assert program.stdout.readline() == "ready\n"
    time.sleep(0.2)
    program.send_signal(signal.SIGINT)
    program.communicate(timeout=60)
    assert program.returncode != 0
    outcome = outcome_of(tmp_path / "run")
    assert (outcome.status, outcome.reason) == ("interrupted", "KeyboardInterrupt")
    assert outcome.step >= 5
    run = read_run(tmp_path / "run")
    assert run.bad_lines == 0
    steps = [r.step for r in run["gradient/norm"].readings]
    assert steps == list(range(len(steps)))
    assert len(steps) - outcome.step in (0, 1)


def test_an_old_exception_is_not_the_end_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a notebook the last error shown stays, whatever came after it."""
    monkeypatch.setattr(sys, "last_value", NameError("an earlier cell"), raising=False)
    training = Training(PLAIN)
    cockpit = watch(training, logdir=tmp_path / "run")
    training.run(2, cockpit.observe)
    cockpit._at_exit()
    assert outcome_of(tmp_path / "run").status == "done"


@pytest.mark.parametrize("given", [True, False], ids=["loss given", "loss recomputed"])
def test_a_run_that_diverges(tmp_path: Path, given: bool) -> None:
    training = Training(PLAIN)
    training.optimizers[0].param_groups[0]["lr"] = 1e38
    folder = tmp_path / "run"
    cockpit = watch(training, logdir=folder, sinks=[TensorBoardSink(folder)], target=at_least("accuracy", 0.9))
    training.run(6, lambda batch, loss: cockpit.observe(batch, loss if given else None))
    outcome = cockpit.close()
    assert outcome is not None
    assert (outcome.status, outcome.reason) == ("diverged", "the training loss is nan")
    log_is_intact(folder, 6)
    run = read_run(folder)
    assert str(run["batch/loss"]["loss"].values[-1]) == "nan"
    assert {r.status for r in run["curvature/sharpness"].readings} <= {"ok", "failed"}
    events_file = EventAccumulator(str(folder))
    events_file.Reload()
    assert [point.step for point in events_file.Scalars("gradient/norm/norm")] == list(range(6))
    assert str(events_file.Scalars("batch/loss/loss")[-1].value) == "nan"
    assert not events(cockpit, "observe_failed")


def test_what_comes_after_the_end_is_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = Training(PLAIN)
    folder = tmp_path / "run"
    cockpit = watch(training, logdir=folder, target=at_least("accuracy", 0.5))
    training.run(2, cockpit.observe)
    outcome = cockpit.close()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    training.run(2, cockpit.observe)
    with cockpit.evaluating() as log:
        log(accuracy=0.9)
    cockpit.log(more=1.0)
    assert cockpit.read("gradient/norm", PLAIN.batch(0)).status == "failed"
    assert cockpit.close("error", "too late") is outcome
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert capsys.readouterr().err == ""
    assert not [r for r in readings(cockpit) if r.step > 2]


def test_a_failure_while_closing_does_not_cost_the_outcome(tmp_path: Path) -> None:
    """An optimizer without hooks is read once more at the end; when strict, that may raise."""
    training = Training(PLAIN)
    cockpit = watch(training, logdir=tmp_path / "run", panel="light", strict=True)
    cockpit.observe(*training.backward(0))

    def broken() -> None:
        raise RuntimeError("no reading here")

    cockpit._observer.settle = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no reading here"):
        cockpit.close()
    assert outcome_of(tmp_path / "run").status == "done"
