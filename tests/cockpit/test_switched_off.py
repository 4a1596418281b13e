"""COCKPIT=off and enabled=False: every call is nothing at all, and nothing is left anywhere."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_cases import CASES, Training
from watching import watch

from cockpit_bench import Cockpit, Reading, at_least
from cockpit_bench.testing.traces import differences, objects_of, state_of
from instruments.curvature.sharpness import Sharpness

PLAIN = CASES[0]


@pytest.fixture(params=["environment", "argument"])
def settings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    if request.param == "argument":
        return {"enabled": False}
    monkeypatch.setenv("COCKPIT", "off")
    return {}


def test_every_call_is_nothing(settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = Training(PLAIN)
    sides = training.model, training.optimizers
    target = at_least("accuracy", 0.5)
    cockpit = watch(training, logdir=tmp_path / "run", target=target, sinks=None, **settings)
    before = [state_of(*sides), objects_of(*sides)]
    with cockpit as same:
        assert same is cockpit
        assert list(cockpit.batches([1, 2, 3])) == [1, 2, 3]
        cockpit.observe("no batch at all", loss=torch.tensor(1.0))
        with cockpit.evaluating() as log:
            log(accuracy=0.9)
        cockpit.log(tokens=1)
        reading = cockpit.read("curvature/sharpness")
        assert isinstance(reading, Reading)
        assert (reading.status, reading.reason) == ("skipped", "the cockpit is switched off")
        assert cockpit.read(Sharpness()).status == "skipped"
        cockpit.load_state_dict({"step": 7})
        assert cockpit.state_dict() == {}
        cockpit.save_checkpoint("last.pt", model=training.model.state_dict())
        cockpit.write_text("note.txt", "hello")
        with cockpit.clock.bucket("forward"):
            pass
        assert (cockpit.step, cockpit.last, cockpit.records, cockpit.outcome) == (0, {}, [], None)
        assert not cockpit.target_hit
    assert cockpit.close() is None
    assert differences(before, [state_of(*sides), objects_of(*sides)]) == []
    assert len(training.optimizers[0]._optimizer_step_pre_hooks) == 0
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_what_would_be_misuse_is_not_looked_at(settings: dict[str, Any]) -> None:
    cockpit = Cockpit(None, None, loss=None, panel="nonsense", budget=17, **settings)  # type: ignore[arg-type]
    cockpit.observe(None)
    cockpit.close()


def test_a_checkpoint_passes_through(settings: dict[str, Any]) -> None:
    """A run that was saved without the cockpit goes on with it: there is nothing to load."""
    off = watch(Training(PLAIN), **settings)
    on = watch(Training(PLAIN), enabled=True) if settings else None
    if on is not None:
        on.load_state_dict(off.state_dict())
        assert on.step == 0
        on.close()


def test_nobody_holds_it(settings: dict[str, Any]) -> None:
    cockpit = watch(Training(PLAIN), **settings)
    trace = weakref.ref(cockpit)
    del cockpit
    gc.collect()
    assert trace() is None


@pytest.mark.parametrize(("word", "on"), [("OFF", False), ("0", False), ("false", False), ("", True), ("on", True)])
def test_the_word_in_the_environment(word: str, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COCKPIT", word)
    cockpit = watch(Training(PLAIN))
    assert cockpit.enabled is on
    cockpit.close()
