"""Targets, evaluations, the user's own numbers, the last values, and readings on demand."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_cases import CASES, Case, Training, mlp, rows
from refusals import expected_refusals
from torch import nn
from watching import EVERYTHING, events, readings, watch

from cockpit_bench import Cockpit, Metrics, at_least, at_most, read_run
from cockpit_bench.testing.traces import differences, objects_of, state_of
from instruments.curvature.sharpness import Sharpness

PLAIN = CASES[0]


def evaluated(cockpit: Cockpit, training: Training, metrics: list[dict[str, Any]]) -> None:
    """One step, then one evaluation, for each of the metrics."""
    for step, values in enumerate(metrics):
        cockpit.observe(*training.backward(step))
        training.take_step()
        with cockpit.evaluating() as log:
            log(**values)


def test_the_first_hit_counts(tmp_path: Path) -> None:
    training = Training(PLAIN)
    cockpit = watch(training, target=at_least("accuracy", 0.9), logdir=tmp_path / "run", instruments=None)
    evaluated(cockpit, training, [{"accuracy": x} for x in (0.5, 0.9, 0.7, 0.95)])
    outcome = cockpit.close()
    (event,) = events(cockpit, "target_hit")
    assert (event.step, event.detail) == (2, {"target": "accuracy >= 0.9"})
    assert outcome is not None
    assert (outcome.status, outcome.hit_step, outcome.best, outcome.step) == ("hit", 2, 0.95, 4)
    assert outcome.hit_seconds == event.seconds
    assert 0 < outcome.hit_seconds < outcome.seconds
    series = read_run(tmp_path / "run").metrics["accuracy"]
    assert (series.steps.tolist(), series.values.tolist()) == ([1, 2, 3, 4], [0.5, 0.9, 0.7, 0.95])


def test_downwards() -> None:
    training = Training(PLAIN)
    cockpit = watch(training, target=at_most("loss", 1.0), instruments=None)
    evaluated(cockpit, training, [{"loss": 2.0}, {"loss": 1.5}, {"loss": 1.7}])
    assert not cockpit.target_hit
    outcome = cockpit.close()
    assert outcome is not None
    assert (outcome.status, outcome.hit_step, outcome.best) == ("miss", None, 1.5)


@pytest.mark.parametrize("target", [at_least("m", 0.0), at_most("m", 0.0)], ids=str)
def test_a_nan_never_hits_and_is_never_the_best(target: Any) -> None:
    training = Training(PLAIN)
    cockpit = watch(training, target=target, instruments=None)
    worse = -1.0 if target.direction == "at_least" else 1.0
    evaluated(cockpit, training, [{"m": math.nan}])
    assert cockpit.state_dict()["ending"]["best"] is None
    evaluated(cockpit, training, [{"m": worse}, {"m": torch.tensor(math.nan)}])
    assert not cockpit.target_hit
    outcome = cockpit.close()
    assert outcome is not None
    assert (outcome.status, outcome.best) == ("miss", worse)


def test_other_metrics_do_not_hit() -> None:
    training = Training(PLAIN)
    cockpit = watch(training, target=at_least("valid_accuracy", 0.9), instruments=None)
    evaluated(cockpit, training, [{"train_accuracy": 1.0}, {"train_accuracy": 1.0, "valid_accuracy": 0.5}])
    assert not cockpit.target_hit
    cockpit.log(valid_accuracy=1.0)
    assert not cockpit.target_hit, "only an evaluation counts"
    cockpit.close()


def test_an_evaluation_is_off_the_training_clock() -> None:
    training = Training(PLAIN)
    cockpit = watch(training, instruments=None)
    training.run(1)
    with cockpit.evaluating() as log:
        before = cockpit.clock.training
        training.model(torch.randn(5000, 6))
        log(accuracy=torch.tensor(0.5))
        assert cockpit.clock.training == before
    cockpit.close()
    (record,) = [r for r in cockpit.records if isinstance(r, Metrics)]
    assert (record.source, dict(record.values), record.seconds) == ("evaluation", {"accuracy": 0.5}, before)


def test_the_users_own_numbers() -> None:
    training = Training(PLAIN)
    cockpit = watch(training, instruments=None)
    training.run(2, cockpit.observe)
    cockpit.log(tokens_per_second=7, loss_scale=torch.tensor(2.0))
    (record,) = [r for r in cockpit.records if isinstance(r, Metrics)]
    assert (record.step, record.source) == (2, "user")
    assert record.values == {"tokens_per_second": 7.0, "loss_scale": 2.0}
    cockpit.close()


def test_the_last_values() -> None:
    training = Training(PLAIN)
    cockpit = watch(training)
    assert dict(cockpit.last) == {}
    training.run(3, cockpit.observe)
    assert set(cockpit.last) == set(EVERYTHING) - expected_refusals(training)
    assert cockpit.last["gradient/norm"] == readings(cockpit, "gradient/norm")[-1].values
    assert cockpit.last["batch/loss"]["loss"] == pytest.approx(training.losses[-1])
    cockpit.close()


def test_a_reading_on_demand_between_backward_and_step() -> None:
    training = Training(Case("dropout", lambda: mlp(nn.Dropout(0.5), nn.BatchNorm1d(8))))
    sides = training.model, training.optimizers
    cockpit = watch(training, instruments=None)
    cockpit.observe(*training.backward(0))
    norm = torch.stack([p.grad.norm() for p in training.model.parameters()]).norm().item()
    before = [state_of(*sides), objects_of(*sides)]
    assert cockpit.read("gradient/norm").values["norm"] == pytest.approx(norm)
    loss = cockpit.read("batch/loss")
    assert (loss.values["loss"], loss.provenance["loss"]) == (pytest.approx(training.losses[0]), "given")
    for name in EVERYTHING:
        cockpit.read(name)
    assert differences(before, [state_of(*sides), objects_of(*sides)]) == []
    assert [r.instrument for r in readings(cockpit)] == ["gradient/norm", "batch/loss", *EVERYTHING]
    assert "before the step were not kept" in readings(cockpit, "step/step_ratio", "failed")[0].reason
    training.take_step()
    assert cockpit.step == 1
    cockpit.close()


def test_after_the_step_the_loss_is_read_anew() -> None:
    training = Training(PLAIN)
    cockpit = watch(training, instruments=None)
    training.run(1, cockpit.observe)
    reading = cockpit.read("batch/loss")
    assert (reading.step, reading.provenance["loss"]) == (1, "recomputed")
    assert reading.values["loss"] < training.losses[0]
    cockpit.close()


def test_a_reading_of_another_batch() -> None:
    training = Training(PLAIN)
    cockpit = watch(training, panel="light")
    cockpit.observe(*training.backward(0))
    other = rows(50)
    expected = PLAIN.loss(training.model(other[0]), other[1]).item()
    assert cockpit.read("batch/loss", other).values["loss"] == pytest.approx(expected)
    small = tuple(part[:5] for part in other)
    assert cockpit.read("gradient/noise_scale", small).provenance["examples"] == 5
    assert cockpit.read("curvature/sharpness", small).provenance["examples"] == 5, "no probe batch is held"
    cockpit.close()


def test_a_reading_before_anything_was_observed() -> None:
    cockpit = watch(Training(PLAIN))
    reading = cockpit.read("curvature/sharpness")
    assert (reading.status, reading.step) == ("failed", 0)
    assert "no batch was observed yet; pass batch=" in reading.reason
    assert cockpit.read("curvature/sharpness", rows(0)).status == "ok"
    held = watch(Training(PLAIN), probe=[rows(0)])
    assert held.read("curvature/sharpness").status == "ok"
    for one in (cockpit, held):
        one.close()


def test_a_reading_of_an_unknown_name() -> None:
    training = Training(PLAIN)
    cockpit = watch(training)
    training.run(1, cockpit.observe)
    before = len(cockpit.records)
    with pytest.raises(ValueError, match=r"got 'curvature/sharpnes'; did you mean curvature/sharpness"):
        cockpit.read("curvature/sharpnes")
    assert len(cockpit.records) == before
    cockpit.close()


def test_a_reading_by_an_instrument_of_ones_own_settings() -> None:
    training = Training(PLAIN)
    cockpit = watch(training, instruments={"fine": (Sharpness(tol=1e-5), 100)})
    training.run(2, cockpit.observe)
    by_instance = cockpit.read(Sharpness(tol=1e-5))
    assert (by_instance.instrument, by_instance.status) == ("Sharpness", "ok")
    by_label = cockpit.read("fine")
    assert by_label.values["sharpness"] == pytest.approx(by_instance.values["sharpness"], rel=1e-3)
    assert by_label.cost["products"] > 0
    assert cockpit.state_dict()["readout"]["stations"]["fine"]["state"]["readings"] == 2, "it went on from its memory"
    cockpit.close()
