"""An instrument never stops training, a sink never does, and neither does the cockpit itself."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from loop_cases import CASES, Training
from refusals import expected_refusals
from torch import Tensor
from watching import EVERYTHING, events, readings, values, watch

from cockpit_bench import Cockpit, Gauge, Output, Refusal
from cockpit_bench.sinks import Sink
from cockpit_bench.testing.traces import differences, state_of
from instruments import catalogue
from instruments.instrument import Values
from instruments.view import Need, View

PLAIN = CASES[0]


@dataclass(frozen=True)
class Flaky(Gauge):
    """Refuses at some steps, breaks at others."""

    refuses: tuple[int, ...] = ()
    breaks: tuple[int, ...] = ()

    outputs: ClassVar[Mapping[str, Output]] = {"step": Output("1", "the step")}
    needs: ClassVar[frozenset[Need]] = frozenset()
    reference: ClassVar[str] = "none"

    def price(self, view: View) -> float:
        return 0.0

    def read(self, view: View) -> Values:
        if view.step in self.refuses:
            raise Refusal("not at this step; try another.")
        if view.step in self.breaks:
            return {"step": 1 / 0}
        return {"step": float(view.step)}


@dataclass(frozen=True)
class FlakyAfterTheStep(Flaky):
    """The same, read when the step is done."""

    needs: ClassVar[frozenset[Need]] = frozenset({"update"})


def run(instrument: Any, steps: int = 10, **settings: Any) -> Cockpit:
    training = Training(PLAIN)
    cockpit = watch(training, instruments={"flaky": (instrument, 1), "gradient/norm": 1}, **settings)
    training.run(steps, cockpit.observe)
    assert cockpit.step == steps
    assert len(readings(cockpit, "gradient/norm", "ok")) == steps
    cockpit.close()
    return cockpit


@pytest.mark.parametrize("kind", [Flaky, FlakyAfterTheStep])
def test_a_stretch_of_failures_is_one_record(kind: Any) -> None:
    cockpit = run(kind(refuses=(2, 3, 7), breaks=(5,)))
    found = [(r.step, r.status) for r in readings(cockpit, "flaky")]
    failed = [step for step, status in found if status == "failed"]
    assert failed == [2, 5, 7]
    assert [step for step, status in found if status == "ok"] == [0, 1, 4, 6, 8, 9]
    refused, broken = "not at this step; try another.", "ZeroDivisionError: division by zero"
    assert [r.reason for r in readings(cockpit, "flaky", "failed")] == [refused, broken, refused]
    assert not events(cockpit, "retired")


@pytest.mark.parametrize("kind", [Flaky, FlakyAfterTheStep])
def test_three_failures_in_a_row_retire_an_instrument(kind: Any) -> None:
    cockpit = run(kind(breaks=tuple(range(4, 10))))
    assert [(r.step, r.status) for r in readings(cockpit, "flaky")][-1] == (4, "failed")
    (event,) = events(cockpit, "retired")
    assert event.step == 6
    assert event.detail == {
        "instrument": "flaky", "failures": 3, "reason": "ZeroDivisionError: division by zero"
    }  # fmt: skip


@pytest.mark.parametrize("kind", [Flaky, FlakyAfterTheStep])
def test_strict_raises_what_would_be_logged(kind: Any) -> None:
    with pytest.raises(Refusal, match="not at this step"):
        run(kind(refuses=(2,)), strict=True)


@dataclass(frozen=True)
class Odd(Flaky):
    """Returns what it did not declare, or something that is no number."""

    gives: Any = None

    def read(self, view: View) -> Values:
        return self.gives


@pytest.mark.parametrize(
    ("gives", "reason"),
    [
        ({"steps": 1.0}, r"expected the outputs \['step'\], got \['steps'\]"),
        ({}, r"expected the outputs \['step'\], got \[\]"),
        (None, "TypeError"),
    ],
)
def test_what_was_not_declared_is_a_failure(gives: Any, reason: str) -> None:
    cockpit = run(Odd(gives=gives), steps=2)
    assert re.search(reason, readings(cockpit, "flaky", "failed")[0].reason)


def test_arrays_and_tensors_become_plain_values() -> None:
    for gives, plain in (
        (torch.tensor(2.0), 2.0),
        (np.float32(3), 3.0),
        (torch.tensor(1.5, dtype=torch.bfloat16), 1.5),
    ):
        value = values(run(Odd(gives={"step": gives}), steps=1), "flaky", "step")[0]
        assert (value, type(value)) == (plain, float)


class BrokenSink(Sink):
    """Fails at its third record."""

    def __init__(self) -> None:
        self.taken, self.closed = 0, 0

    def write(self, record: Any) -> None:
        self.taken += 1
        if self.taken == 3:
            raise OSError("no space left on device")

    def close(self) -> None:
        self.closed += 1


def test_a_sink_that_fails_is_switched_off(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    broken = BrokenSink()
    cockpit = run(Flaky(), sinks=[broken], logdir=tmp_path / "run")
    (event,) = events(cockpit, "sink_disabled")
    assert event.detail == {"sink": "BrokenSink", "error": "OSError: no space left on device"}
    assert (broken.taken, broken.closed) == (3, 1)
    assert "BrokenSink failed and is switched off, training goes on" in capsys.readouterr().err


def test_a_function_that_fails_is_switched_off_too(capsys: pytest.CaptureFixture[str]) -> None:
    cockpit = run(Flaky(), sinks=[lambda record: 1 / 0])
    assert len(events(cockpit, "sink_disabled")) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


class BrokenScaler:
    """A scaler of another library, without what is looked up in torch's."""

    def is_enabled(self) -> bool:
        return True

    def get_scale(self) -> float:
        return 1.0


def test_trouble_in_the_cockpit_is_logged_once_and_training_goes_on() -> None:
    training = Training(PLAIN)
    cockpit = watch(training, scaler=BrokenScaler())
    training.run(4, cockpit.observe)
    (event,) = events(cockpit, "observe_failed")
    assert "_per_optimizer_states" in event.detail["reason"]
    assert cockpit.step == 4
    cockpit.close()


def test_trouble_inside_the_optimizers_step_does_not_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hooks run within the user's optimizer.step()."""
    training, plain = Training(PLAIN), Training(PLAIN).run(3)
    cockpit = watch(training, scaler=None)

    def broken(*args: Any) -> float:
        raise AttributeError("no such thing")

    for step in range(3):
        cockpit.observe(*training.backward(step))
        with monkeypatch.context() as patch:
            patch.setattr("cockpit_bench.probes.loss_scale", broken)
            patch.setattr("instruments.probe.step_effect", broken)
            training.take_step()
    assert cockpit.step == 3
    assert differences(state_of(plain.model, plain.optimizers), state_of(training.model, training.optimizers)) == []
    (event,) = events(cockpit, "observe_failed")
    assert "no such thing" in event.detail["reason"]
    assert "no such thing" in readings(cockpit, "step/step_ratio", "failed")[0].reason
    cockpit.close()


def test_a_model_that_freezes_on_the_way() -> None:
    training = Training(PLAIN)
    cockpit = watch(training)
    training.run(2, cockpit.observe)
    cockpit.observe(*training.backward(2))
    training.model.requires_grad_(False)
    training.take_step()
    cockpit.observe(PLAIN.batch(3))
    training.take_step()
    assert cockpit.step == 4
    assert "with trainable parameters" in str(events(cockpit, "observe_failed")[0].detail)
    training.model.requires_grad_(True)
    cockpit.observe(*training.backward(4))
    assert readings(cockpit, "gradient/norm")[-1].step == 4
    cockpit.close()


def test_out_of_memory_halves_the_probe_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products on more than two batches do not fit, whether their graphs are kept or not."""
    from instruments.operators.hessian import HessianOperator

    product = HessianOperator.matvec

    def narrow(self: HessianOperator, v_D: Tensor) -> Tensor:
        if len(self._pieces) > 2:
            raise torch.OutOfMemoryError("planted")
        return product(self, v_D)

    monkeypatch.setattr(HessianOperator, "matvec", narrow)
    training = Training(PLAIN)
    probe = [PLAIN.batch(100 + i) for i in range(8)]
    cockpit = watch(training, probe=probe, instruments={"curvature/sharpness": 1, "gradient/norm": 1})
    training.run(3, cockpit.observe)
    found = readings(cockpit, "curvature/sharpness")
    assert [(r.status, r.provenance["examples"]) for r in found] == [("ok", 24)] * 3
    assert "rebuilt" in found[0].provenance["route"]
    (event,) = events(cockpit, "probe_shrunk")
    assert event.detail == {"instrument": "curvature/sharpness", "examples": 24, "graphs_kept": False}
    assert not events(cockpit, "retired")
    assert len(probe) == 8, "the user's own list is not touched"
    cockpit.close()


def test_out_of_memory_with_nothing_left_to_give_up_is_a_failed_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_at_all(self: Any, v_D: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr("instruments.operators.hessian.HessianOperator.matvec", none_at_all)
    training = Training(PLAIN)
    cockpit = watch(training)
    training.run(3, cockpit.observe)
    assert "planted" in readings(cockpit, "curvature/sharpness", "failed")[0].reason
    curvature = {name for name in EVERYTHING if catalogue.make(name).needs & {"hessian", "step_hessian"}}
    expected = set(EVERYTHING) - curvature - expected_refusals(training)
    assert {r.instrument for r in readings(cockpit, status="ok")} == expected
    cockpit.close()
