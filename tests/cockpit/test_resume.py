"""A run that was stopped goes on as if it had not been: same readings, same count, one log."""

from pathlib import Path
from typing import Any

import pytest
import torch
from loop_cases import CASES, Case, Training, case_named, mlp, two_groups
from refusals import expected_refusals
from torch import nn
from watching import EVERYTHING, events, readings, watch

from cockpit_bench import Cockpit, Outcome, Reading, at_least, read_run

CASE = Case("dropout", lambda: mlp(nn.Dropout(0.3)), two_groups)
PLAIN = CASES[0]
STEPS, SAVED_AT = 6, 3


def save(path: Path, training: Training, cockpit: Cockpit) -> None:
    torch.save(
        {
            "model": training.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in training.optimizers],
            "random": torch.get_rng_state(),
            "cockpit": cockpit.state_dict(),
        },
        path,
    )


def load(path: Path, training: Training, cockpit: Cockpit) -> None:
    saved = torch.load(path)  # as torch does it by default: nothing but tensors and plain types
    training.model.load_state_dict(saved["model"])
    for optimizer, state in zip(training.optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    torch.set_rng_state(saved["random"])
    cockpit.load_state_dict(saved["cockpit"])


def go_on(training: Training, cockpit: Cockpit, first: int, end: int) -> None:
    for step in range(first, end):
        for micro in range(training.case.accumulate):
            cockpit.observe(*training.backward(step, micro))
        training.take_step()


def interrupted(folder: Path, case: Case, *, stopped_at: int = SAVED_AT, **settings: Any) -> Cockpit:
    """Train, save on the way, stop, and go on from the checkpoint in another cockpit, which is returned."""
    first = Training(case)
    cockpit = watch(first, logdir=folder / "run", **settings)
    go_on(first, cockpit, 0, SAVED_AT)
    save(folder / "last.pt", first, cockpit)
    go_on(first, cockpit, SAVED_AT, stopped_at)
    cockpit.close("interrupted")
    second = Training(case)
    resumed = watch(second, logdir=folder / "run", resume=True, **settings)
    load(folder / "last.pt", second, resumed)
    go_on(second, resumed, SAVED_AT, STEPS)
    return resumed


def essence(reading: Reading) -> Any:
    """A reading without what it cost."""
    numbers = {name: torch.as_tensor(value).tolist() for name, value in reading.values.items()}
    return [reading.instrument, reading.step, reading.status, numbers, dict(reading.stderr), dict(reading.provenance)]


@pytest.mark.parametrize("case", [CASE, case_named("accumulation")], ids=lambda case: case.name)
def test_later_readings_are_those_of_a_run_that_never_stopped(tmp_path: Path, case: Case) -> None:
    whole = Training(case)
    reference = watch(whole)
    go_on(whole, reference, 0, STEPS)
    resumed = interrupted(tmp_path, case)
    later = [essence(r) for r in readings(reference) if r.step >= SAVED_AT]
    assert str([essence(r) for r in readings(resumed)]) == str(later)  # NaN is equal to itself as text
    read = set(EVERYTHING) - expected_refusals(whole)
    assert len(later) == len(read) * (STEPS - SAVED_AT)
    reference.close()
    resumed.close()


def test_the_log_holds_every_step_once(tmp_path: Path) -> None:
    resumed = interrupted(tmp_path, CASE, stopped_at=SAVED_AT + 3)
    resumed.close()
    run = read_run(tmp_path / "run")
    for label in set(EVERYTHING) - expected_refusals(Training(CASE)):
        assert [r.step for r in run[label].readings] == list(range(STEPS)), label
    assert [event.detail["from_step"] for event in run.events if event.name == "superseded"] == [SAVED_AT]
    assert [r.status for r in run.records if isinstance(r, Outcome)] == ["done"], "the first outcome was taken back"
    seconds = [r.seconds for r in run["gradient/norm"].readings]
    assert seconds == sorted(seconds)


def test_without_a_checkpoint_the_run_starts_again_in_the_same_log(tmp_path: Path) -> None:
    for _ in range(2):
        training = Training(CASE)
        cockpit = watch(training, logdir=tmp_path / "run", resume=True, instruments={"gradient/norm": 1})
        go_on(training, cockpit, 0, 3)
        cockpit.close()
    run = read_run(tmp_path / "run")
    assert [r.step for r in run["gradient/norm"].readings] == [0, 1, 2]
    assert [event.detail["from_step"] for event in run.events if event.name == "superseded"] == [0]


def test_a_folder_with_a_run_is_refused(tmp_path: Path) -> None:
    watch(Training(PLAIN), logdir=tmp_path / "run").close()
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match=r"already holds log.jsonl; pass resume=True"):
        watch(Training(PLAIN), logdir=tmp_path / "run")
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before


def test_a_state_in_memory_is_a_snapshot() -> None:
    training = Training(PLAIN)
    cockpit = watch(training)
    go_on(training, cockpit, 0, 1)
    state = cockpit.state_dict()
    before = str(state)
    go_on(training, cockpit, 1, 3)
    assert str(state) == before
    assert len(state["held"]["batches"]) == 1
    cockpit.close()


def test_first_readings_are_not_free_again_and_skips_add_up(tmp_path: Path) -> None:
    resumed = interrupted(tmp_path, PLAIN, instruments={"curvature/sharpness": 1}, budget=0.0)
    assert readings(resumed) == [], "the stretch of skips goes on, its record stands already"
    outcome = resumed.close()
    assert outcome is not None
    assert outcome.skips == {"curvature/sharpness": STEPS - 1}
    assert [r.status for r in read_run(tmp_path / "run")["curvature/sharpness"].readings] == ["ok", "skipped"]


def test_the_loss_is_compared_once_in_all(tmp_path: Path) -> None:
    wrong = nn.CrossEntropyLoss(label_smoothing=0.9)
    resumed = interrupted(tmp_path, PLAIN, loss=wrong)
    assert not events(resumed, "gradient_mismatch")
    resumed.close()
    assert [e.name for e in read_run(tmp_path / "run").events].count("gradient_mismatch") == 1


def test_a_retired_instrument_stays_retired(tmp_path: Path) -> None:
    resumed = interrupted(tmp_path, case_named("batch norm"))
    assert not readings(resumed, "gradient/noise_scale")
    assert not events(resumed, "retired")
    resumed.close()


def test_the_first_hit_is_remembered() -> None:
    goal = at_least("accuracy", 0.9)
    cockpits = [watch(Training(PLAIN), target=goal) for _ in range(2)]
    with cockpits[0].evaluating() as log:
        log(accuracy=0.95)
    cockpits[1].load_state_dict(cockpits[0].state_dict())
    assert cockpits[1].target_hit
    with cockpits[1].evaluating() as log:
        log(accuracy=0.99)
    assert not events(cockpits[1], "target_hit")
    outcome = cockpits[1].close()
    assert outcome is not None
    assert (outcome.status, outcome.hit_step, outcome.best) == ("hit", 0, 0.99)
    cockpits[0].close()
