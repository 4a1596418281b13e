"""What the budget lets through: first readings, and the rest when training time has paid for it."""

import time
from typing import Any

import pytest
from loop_cases import CASES, Training
from refusals import expected_refusals
from watching import events, readings, watch

from cockpit_bench import Cockpit
from cockpit_bench.panels import PANELS
from instruments.refusal import Refusal

PLAIN = CASES[0]
PANEL = dict.fromkeys(set(PANELS["standard"]) - expected_refusals(Training(PLAIN)), 1)


def set_training_seconds(cockpit: Cockpit, seconds: float) -> None:
    """Time passes, without anybody waiting for it."""
    state = cockpit.clock.state_dict()
    cockpit.clock.load_state_dict({**state, "other": seconds})


def test_without_a_budget_there_are_first_readings_and_no_others() -> None:
    training = Training(PLAIN)
    cockpit = watch(training, instruments=PANEL, budget=0.0)
    training.run(6, cockpit.observe)
    for label in PANEL:
        assert [r.step for r in readings(cockpit, label, "ok")] == [0], label
    outcome = cockpit.close()
    assert outcome is not None
    assert dict(outcome.skips) == dict.fromkeys(PANEL, 5)
    assert set(outcome.tax) == set(PANEL)


def test_a_stretch_of_skips_is_one_record_and_the_next_reading_counts_them() -> None:
    training = Training(PLAIN)
    cockpit = watch(training, instruments={"curvature/sharpness": 1}, budget=0.05)
    for step in range(12):
        set_training_seconds(cockpit, 1e9 if step in (5, 6, 9) else 0.0)
        cockpit.observe(*training.backward(step))
        training.take_step()
    found = [(r.step, r.status, r.provenance.get("skipped")) for r in readings(cockpit)]
    assert found == [
        (0, "ok", None),
        (1, "skipped", None),
        (5, "ok", 4),
        (6, "ok", None),
        (7, "skipped", None),
        (9, "ok", 2),
        (10, "skipped", None),
    ]
    assert "over the budget: a reading takes about" in readings(cockpit, status="skipped")[0].reason
    outcome = cockpit.close()
    assert outcome is not None
    assert outcome.skips == {"curvature/sharpness": 8}


def test_a_loss_that_must_be_recomputed_is_not_free() -> None:
    training = Training(PLAIN)
    cockpit = watch(training, panel="light", budget=0.0)
    training.run(3, lambda batch, loss: cockpit.observe(batch))
    assert [r.step for r in readings(cockpit, "batch/loss", "ok")] == [0]
    cockpit.close()


def test_no_budget_is_no_limit() -> None:
    training = Training(PLAIN)
    cockpit = watch(training, instruments=PANEL, budget=None)
    training.run(3, cockpit.observe)
    assert len(readings(cockpit, status="ok")) == 3 * len(PANEL)
    assert not readings(cockpit, status="skipped")
    cockpit.close()


def test_a_reading_on_demand_is_taken_whatever_the_budget_and_ends_the_stretch() -> None:
    training = Training(PLAIN)
    cockpit = watch(training, instruments={"curvature/sharpness": 1}, budget=0.0)
    training.run(3, cockpit.observe)
    asked = cockpit.read("curvature/sharpness")
    assert (asked.status, asked.provenance["skipped"]) == ("ok", 2)
    assert "skipped" not in cockpit.read("curvature/sharpness").provenance
    cockpit.close()


def test_a_failure_is_paid_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else an instrument that fails late would be tried again at every step, at full price."""

    def refuses(*args: Any, **kwargs: Any) -> Any:
        raise Refusal("planted")

    monkeypatch.setattr("instruments.curvature.sharpness.follow", refuses)
    training = Training(PLAIN)
    cockpit = watch(training, instruments={"curvature/sharpness": 1}, budget=0.0)
    training.run(5, cockpit.observe)
    assert [(r.step, r.status) for r in readings(cockpit)] == [(0, "failed"), (1, "skipped")]
    assert not events(cockpit, "retired")
    cockpit.close()


def test_skips_are_counted_in_one_reading_only_also_when_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(PLAIN)
    cockpit = watch(training, instruments={"curvature/sharpness": 1}, budget=0.05)
    training.run(4, cockpit.observe)
    set_training_seconds(cockpit, 1e9)
    with monkeypatch.context() as patch:
        patch.setattr("instruments.curvature.sharpness.follow", lambda *args, **kwargs: 1 / 0)
        training.run(1, cockpit.observe)
    training.run(1, cockpit.observe)
    found = [(r.step, r.status, r.provenance.get("skipped")) for r in readings(cockpit)]
    assert found == [(0, "ok", None), (1, "skipped", None), (4, "failed", 3), (5, "ok", None)]
    cockpit.close()


def test_observation_is_off_the_training_clock() -> None:
    training = Training(PLAIN)

    def slow(step: int) -> bool:
        time.sleep(0.05)
        return True

    cockpit = watch(training, panel="light", instruments={"curvature/sharpness": slow})
    training.run(5, cockpit.observe)
    outcome = cockpit.close()
    assert outcome is not None
    assert sum(outcome.tax.values()) <= outcome.buckets["observe"] + 1e-9
    assert outcome.buckets["observe"] > 5 * 0.05, "also what no instrument is charged for"
    off = ("observe", "log", "evaluate")
    assert outcome.seconds == pytest.approx(outcome.wall - sum(outcome.buckets.get(name, 0.0) for name in off))
    assert outcome.buckets["update"] > 0


def test_what_no_instrument_is_billed_for_is_paid_out_of_the_budget_too() -> None:
    training = Training(PLAIN)
    cockpit = watch(training, instruments={"curvature/sharpness": 1}, budget=0.05)

    def observe(batch: Any, loss: Any) -> None:
        with cockpit.clock.bucket("observe"):
            time.sleep(0.02)
        cockpit.observe(batch, loss)

    training.run(2, observe)
    cost = readings(cockpit, "curvature/sharpness", "ok")[0].cost["seconds"]
    set_training_seconds(cockpit, (2 * cost + 0.01) / 0.05)
    training.run(1, observe)
    assert len(readings(cockpit, "curvature/sharpness", "ok")) == 1, "the reading alone would fit, with the rest not"
    set_training_seconds(cockpit, 1e9)
    training.run(1, observe)
    assert len(readings(cockpit, "curvature/sharpness", "ok")) == 2
    cockpit.close()


def test_where_nothing_can_be_paid_nothing_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(PLAIN)
    cockpit = watch(training, instruments={"curvature/sharpness": 1}, budget=0.0)
    training.run(1, cockpit.observe)
    monkeypatch.setattr("cockpit_bench.probes.Probe", lambda *args, **kwargs: pytest.fail("a probe was opened"))
    training.run(3, cockpit.observe)
    assert not events(cockpit, "observe_failed")
    outcome = cockpit.close()
    assert outcome is not None
    assert outcome.skips == {"curvature/sharpness": 3}
