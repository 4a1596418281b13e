"""Round a loop: single examples are read from the training's own pass, as a pass of the reading itself would."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loop_cases import CROSS_ENTROPY, Case, Training, adam, cnn, mlp, rows
from test_many_readings import living
from torch import nn
from watching import events, readings, watch

from cockpit_bench.testing.traces import differences, state_of

NAMES = (
    "gradient/noise_scale", "gradient/signal_to_noise", "gradient/gradient_tests", "gradient/coherence", "step/alpha",
    "step/step_ratio",
)  # fmt: skip
STEPS = 6
OWN = "of the training itself"


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """As in a process in which no test before this one has compiled anything."""
    if (utils := sys.modules.get("torch._dynamo.utils")) is not None:
        utils.counters.clear()


def watched(case: Case, steps: int = STEPS, **settings: Any) -> tuple[Training, Any]:
    training = Training(case)
    cockpit = watch(training, panel=None, instruments=dict.fromkeys(NAMES, 1), **settings)
    for step in range(steps):
        cockpit.observe(*training.backward(step))
        training.take_step()
    return training, cockpit


def passes(cockpit: Any, label: str) -> list[Any]:
    return [r.provenance.get("pass") for r in readings(cockpit, label, "ok")]


@pytest.mark.parametrize("model", [mlp, cnn])
def test_values_are_those_of_a_pass_of_its_own(model: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("plain", model, adam)
    training, cockpit = watched(case)
    assert passes(cockpit, "gradient/noise_scale") == [None] + [OWN] * (STEPS - 1)
    assert [r.cost["gradients"] for r in readings(cockpit, "gradient/noise_scale", "ok")][1:] == [1.0] * (STEPS - 1)
    cockpit.close()
    monkeypatch.setattr("cockpit_bench.observer.PassWatch.arm", lambda self, layout: None)
    unwatched, plain = watched(case)
    assert set(passes(plain, "gradient/noise_scale")) == {None}
    plain.close()
    for one, other in zip(readings(cockpit), readings(plain), strict=True):
        assert (one.instrument, one.step, one.status) == (other.instrument, other.step, other.status)
        for name, value in one.values.items():
            assert value == pytest.approx(other.values[name], rel=1e-3, abs=1e-5, nan_ok=True), (one.instrument, name)
    ends = [state_of(t.model, t.optimizers) for t in (training, unwatched)]
    assert differences(*ends) == []


@pytest.mark.parametrize(("name", "first", "later"), [("step/alpha", 7 / 3, 2 / 3), ("step/step_ratio", 4 / 3, 1 / 3)])
def test_what_a_step_does_needs_no_pass_before_it(name: str, first: float, later: float) -> None:
    """Once the graph is known, here from a reading of single examples at the first step."""
    training = Training(Case("plain", mlp, adam))
    cockpit = watch(training, panel=None, instruments={name: 1, "gradient/coherence": 1000})
    for step in range(4):
        cockpit.observe(*training.backward(step))
        training.take_step()
    prices = [r.cost["gradients"] for r in readings(cockpit, name, "ok")]
    assert prices[0] <= first + 1e-3
    assert prices[1:] == pytest.approx([later] * 3, abs=1e-3)
    cockpit.close()


def test_a_gradient_that_is_clipped_after_observe_is_not_that_of_the_slope() -> None:
    """What was proved is copied before anybody writes to it."""
    slopes = []
    for watching in (True, False):
        training = Training(Case("plain", mlp, adam))
        cockpit = watch(training, panel=None, instruments={"step/step_ratio": 1, "gradient/coherence": 1000})
        for step in range(4):
            batch, loss = training.backward(step)
            cockpit.observe(batch, loss if watching else None)
            nn.utils.clip_grad_norm_(training.model.parameters(), 1e-3)
            training.take_step()
        assert [r.cost["gradients"] < 1 for r in readings(cockpit, "step/step_ratio", "ok")][1:] == [watching] * 3
        slopes.append([r.values["slope"] for r in readings(cockpit, "step/step_ratio", "ok")])
        cockpit.close()
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-4)


def test_only_steps_with_a_reading_are_watched() -> None:
    training = Training(Case("plain", mlp, adam))
    hooks, counts = nn.modules.module._global_forward_hooks, []
    before = len(hooks)
    cockpit = watch(training, panel=None, instruments={"gradient/coherence": 3})
    for step in range(8):
        counts.append(len(hooks) - before)
        cockpit.observe(*training.backward(step))
        training.take_step()
    cockpit.close()
    assert counts == [0, 0, 0, 1, 0, 0, 1, 0]
    assert len(hooks) == before


@pytest.mark.filterwarnings("error")
def test_a_forked_child_is_left_without_hooks_and_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    training = Training(Case("plain", mlp, adam))
    hooks = nn.modules.module._global_forward_hooks
    before = len(hooks)
    cockpit = watch(training, panel=None, instruments={"gradient/coherence": 1})
    cockpit.observe(*training.backward(0))
    training.take_step()
    assert len(hooks) == before + 1
    parent = cockpit._recorder._process
    cockpit._recorder._process = -1  # as the child of a fork finds it
    for step in (1, 2):
        cockpit.observe(*training.backward(step))
    assert len(hooks) == before
    assert capsys.readouterr().err.count("forked from the one that made the Cockpit") == 1
    cockpit._recorder._process = parent
    cockpit.close()


def test_another_batch_than_the_one_trained_is_not_watched() -> None:
    training = Training(Case("plain", mlp, adam))
    cockpit = watch(training, panel=None, instruments={"gradient/coherence": 1})
    for step in range(3):
        (x, y), loss = training.backward(step)
        cockpit.observe((x.flip(0), y), loss)
        training.take_step()
    assert [event.name for event in events(cockpit, "gradient_mismatch")] == ["gradient_mismatch"]
    assert passes(cockpit, "gradient/coherence") == [None] * 3
    cockpit.close()


def test_a_step_that_was_skipped_and_a_forward_more() -> None:
    """Neither is taken for the step that is read."""
    training = Training(Case("plain", mlp, adam))
    cockpit = watch(training, panel=None, instruments={"gradient/coherence": 1})
    for step in range(6):
        if step == 3:
            training.backward(step)  # thrown away
        if step == 4:
            CROSS_ENTROPY(training.model(rows(7)[0]), rows(7)[1])
        cockpit.observe(*training.backward(step))
        training.take_step()
    assert passes(cockpit, "gradient/coherence") == [None, OWN, OWN, None, None, OWN]
    cockpit.close()


def test_nothing_piles_up() -> None:
    training = Training(Case("plain", mlp, adam))
    cockpit = watch(training, panel=None, instruments=dict.fromkeys(NAMES, 1))
    counts = []
    for step in range(40):
        cockpit.observe(*training.backward(step))
        training.take_step()
        if step in (10, 39):
            counts.append(living())
    cockpit.close()
    grown = counts[1] - counts[0]
    assert not {shape: more for shape, more in grown.items() if len(shape) > 1 and shape[0] != 20}, grown
    assert torch.is_grad_enabled()


def test_an_idle_step_waits_for_the_device_only_round_observe() -> None:
    """Whether to watch the next pass is decided without a wait of its own."""
    training = Training(Case("plain", mlp, adam))
    cockpit, waits = watch(training, panel=None, instruments={"gradient/coherence": 1000}), [0]

    def sync() -> None:
        waits[0] += 1

    cockpit.clock.sync = sync
    counts = []
    for step in range(5):
        before = waits[0]
        cockpit.observe(*training.backward(step))
        training.take_step()
        counts.append(waits[0] - before)
    cockpit.close()
    assert counts[1:] == [2] * 4
