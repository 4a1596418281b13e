"""Loss scales, steps that a GradScaler skips, and clipping between observe and step."""

from typing import Any

import pytest
import torch
from loop_cases import Case, Training, case_named, mlp, rows
from torch import nn, optim
from traces import differences, state_of
from watching import events, readings, values, watch

from cockpit_bench import Cockpit

PLAIN = Case("plain", mlp)
FUSED = Case("fused", mlp, lambda model: [optim.Adam(model.parameters(), lr=0.01, fused=True)])
SCALE = 256.0


def scaled_run(
    case: Case, *, broken: tuple[int, ...] = (), unscale: bool = False, steps: int = 6, **settings: Any
) -> tuple[Training, Any, Cockpit]:
    """Train with a GradScaler; at the steps `broken` one gradient is infinite."""
    training = Training(case)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=100)
    cockpit = watch(training, scaler=scaler, **settings)
    (optimizer,) = training.optimizers
    for step in range(steps):
        batch = case.batch(step)
        loss = case.loss(training.model(batch[0]), batch[1])
        scaler.scale(loss).backward()
        if step in broken:
            next(training.model.parameters()).grad[0, 0] = float("inf")
        if unscale:
            scaler.unscale_(optimizer)
        cockpit.observe(batch, loss)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        training.losses.append(loss.item())
    cockpit.close()
    return training, scaler, cockpit


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("case", [PLAIN, FUSED], ids=lambda case: case.name)
def test_the_gradient_is_read_unscaled(case: Case, unscale: bool) -> None:
    _, _, cockpit = scaled_run(case, unscale=unscale)
    plain = Training(case)
    reference = watch(plain)
    plain.run(6, reference.observe)
    for label, output in (
        ("gradient/norm", "norm"),
        ("batch/loss", "loss"),
        ("curvature/preconditioned_sharpness", "rho"),
        ("step/step_ratio", "change"),
    ):
        assert values(cockpit, label, output) == pytest.approx(values(reference, label, output), rel=1e-3), label
    assert cockpit.step == 6
    for name in ("clip", "gradient_note", "gradient_mismatch", "skipped_step"):
        assert not events(cockpit, name)
    reference.close()


@pytest.mark.parametrize("case", [PLAIN, FUSED], ids=lambda case: case.name)
def test_a_skipped_step_is_an_event_and_not_a_step(case: Case) -> None:
    _, _, cockpit = scaled_run(case, broken=(2,))
    (event,) = events(cockpit, "skipped_step")
    assert event.step == 2
    assert cockpit.step == 5
    assert [r.step for r in readings(cockpit, "gradient/norm")] == [0, 1, 2, 2, 3, 4]
    assert [r.step for r in readings(cockpit, "step/step_ratio", "ok")] == [0, 1, 2, 3, 4], "no step, no step ratio"
    assert values(cockpit, "gradient/norm", "norm")[2] == float("inf")


def test_a_stretch_of_skipped_steps_is_one_event_with_the_scale() -> None:
    _, _, cockpit = scaled_run(PLAIN, broken=(1, 2, 3, 5), steps=7)
    assert [event.step for event in events(cockpit, "skipped_step")] == [1, 2]
    assert all(event.detail["loss_scale"] < SCALE for event in events(cockpit, "skipped_step"))
    assert cockpit.step == 3


@pytest.mark.parametrize("case", [PLAIN, FUSED, case_named("dropout")], ids=lambda case: case.name)
def test_scaled_training_is_the_same_with_and_without(case: Case) -> None:
    ends = []
    for enabled in (False, True):
        training, scaler, _ = scaled_run(case, broken=(2,), enabled=enabled)
        ends.append([training.losses, state_of(training.model, training.optimizers), scaler.state_dict()])
    assert differences(ends[0], ends[1]) == []


def test_the_scaler_learns_of_no_optimizer_by_being_looked_at() -> None:
    training = Training(PLAIN)
    scaler = torch.amp.GradScaler("cpu")
    cockpit = watch(training, scaler=scaler)
    cockpit.observe(*training.backward(0))
    assert len(scaler._per_optimizer_states) == 0
    cockpit.close()


def test_a_scaler_that_is_switched_off_scales_nothing() -> None:
    training = Training(PLAIN)
    cockpit = watch(training, scaler=torch.amp.GradScaler("cpu", enabled=False))
    training.run(2, cockpit.observe)
    norms = values(cockpit, "gradient/norm", "norm")
    cockpit.close()
    plain = Training(PLAIN)
    reference = watch(plain)
    plain.run(2, reference.observe)
    assert norms == values(reference, "gradient/norm", "norm")
    reference.close()


@pytest.mark.parametrize("scaled", [False, True])
def test_clipping_before_the_step_is_an_event_with_both_norms(scaled: bool) -> None:
    training = Training(PLAIN)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE) if scaled else None
    cockpit = watch(training, scaler=scaler)
    (optimizer,) = training.optimizers
    limits = [1e3, 0.01, 1e3, 0.02]
    before = []
    for step, limit in enumerate(limits):
        batch = rows(step)
        loss = PLAIN.loss(training.model(batch[0]), batch[1])
        (scaler.scale(loss) if scaler else loss).backward()
        cockpit.observe(batch, loss)
        if scaler:
            scaler.unscale_(optimizer)
        before.append(float(nn.utils.clip_grad_norm_(training.model.parameters(), limit)))
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad()
    clips = events(cockpit, "clip")
    assert [event.step for event in clips] == [1, 3]
    assert [event.detail["before"] for event in clips] == pytest.approx([before[1], before[3]], rel=1e-4)
    assert [event.detail["after"] for event in clips] == pytest.approx([0.01, 0.02], rel=1e-3)
    assert values(cockpit, "gradient/norm", "norm") == pytest.approx(before, rel=1e-4), "the norm before the clip"
    cockpit.close()


def test_gradients_taken_away_before_the_step_are_no_clip() -> None:
    training = Training(PLAIN)
    cockpit = watch(training)
    cockpit.observe(*training.backward(0))
    training.optimizers[0].zero_grad()
    training.take_step()
    assert not events(cockpit, "clip")
    assert not events(cockpit, "observe_failed")
    assert cockpit.step == 1
    cockpit.close()


def test_no_gradient_at_all_is_a_failed_reading_with_the_remedy() -> None:
    training = Training(PLAIN)
    cockpit = watch(training)
    cockpit.observe(rows(0))
    assert "after backward()" in readings(cockpit, "gradient/norm", "failed")[0].reason
    assert readings(cockpit, "curvature/sharpness", "ok")
    training.take_step()
    assert readings(cockpit, "step/step_ratio", "ok")
    assert not events(cockpit, "observe_failed")
    cockpit.close()
