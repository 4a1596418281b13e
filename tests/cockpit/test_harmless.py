"""Observation never changes training: with every instrument at every step, and without, all is equal bit for bit."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loop_cases import CASES, Case, Training, case_named, mlp, rows
from refusals import check_failed
from torch import Tensor, nn, optim
from watching import EVERYTHING, readings, watch

from cockpit_bench import Cockpit
from cockpit_bench.panels import LIGHT
from cockpit_bench.testing.traces import differences, objects_of, state_of

STEPS = 4
PANELS: dict[str, dict[str, Any]] = {"everything": {}, "light": {"panel": "light"}}
READ = {"everything": set(EVERYTHING), "light": set(LIGHT)}


@cache
def plain(case: Case) -> tuple[list[float], dict[str, Any]]:
    """Losses and final state of the run without a cockpit."""
    training = Training(case).run(STEPS)
    return training.losses, state_of(training.model, training.optimizers)


@pytest.mark.parametrize("panel", PANELS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_training_is_the_same_with_and_without(case: Case, panel: str) -> None:
    losses, end = plain(case)
    training = Training(case)
    sides = training.model, training.optimizers
    cockpit = watch(training, **PANELS[panel])

    def observe(batch: Any, loss: Tensor) -> None:
        before = [state_of(*sides), objects_of(*sides)]
        cockpit.observe(batch, loss)
        assert differences(before, [state_of(*sides), objects_of(*sides)]) == []

    training.run(STEPS, observe)
    assert training.losses == losses
    assert differences(end, state_of(*sides)) == []
    assert cockpit.step == STEPS
    failed = {r.instrument: r.reason for r in readings(cockpit, status="failed")}
    check_failed(training, failed, READ[panel])
    assert {r.instrument for r in readings(cockpit, status="ok")} == READ[panel] - set(failed)
    cockpit.close()


def test_a_cockpit_as_users_make_it(tmp_path: Path) -> None:
    """With its log, TensorBoard and console, the standard panel and a budget."""
    case = case_named("dropout")
    losses, end = plain(case)
    training = Training(case)
    with Cockpit(training.model, training.optimizers, loss=case.loss, logdir=tmp_path / "run") as cockpit:
        training.run(STEPS, cockpit.observe)
        with cockpit.evaluating() as log:
            log(accuracy=0.5)
    assert training.losses == losses
    assert differences(end, state_of(training.model, training.optimizers)) == []
    assert cockpit.outcome is not None
    for label in LIGHT:
        due = STEPS if LIGHT[label] == 1 else 1
        assert len(readings(cockpit, label, "ok")) + cockpit.outcome.skips.get(label, 0) == due, label


def test_a_scheduler_and_gradients_that_are_kept() -> None:
    """set_to_none=False keeps the `.grad` tensors: they must stay the same objects with the same values."""

    def run(watched: bool) -> dict[str, Any]:
        training = Training(CASES[0])
        (optimizer,) = training.optimizers
        schedule = optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=12)
        cockpit = watch(training, enabled=watched)
        for step in range(12):
            cockpit.observe(*training.backward(step))
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            schedule.step()
        cockpit.close()
        return {**state_of(training.model, training.optimizers), "schedule": schedule.state_dict()}

    assert differences(run(False), run(True)) == []


def test_another_network_in_the_loss_is_left_alone() -> None:
    """A generator is trained through a critic whose own gradients are waiting for its own optimizer."""
    training = Training(CASES[0])
    critic = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    critic(torch.ones(2, 3)).sum().backward()

    def losses(call: Any, batch: Any) -> Tensor:
        return F.softplus(-critic(call(batch[0]))).squeeze(1)

    cockpit = watch(training, loss=losses)
    for step in range(2):
        batch = rows(step)
        loss = losses(training.model, batch).mean()
        loss.backward()
        before = [state_of(critic, ()), objects_of(critic, ())]
        cockpit.observe(batch, loss)
        training.take_step()
        assert differences(before, [state_of(critic, ()), objects_of(critic, ())]) == []
    check_failed(training, {r.instrument: r.reason for r in readings(cockpit, status="failed")})
    cockpit.close()


def test_random_streams_of_devices_not_in_use_are_not_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed left for a device that starts later would take the place of the user's."""
    training = Training(CASES[0])
    cockpit = watch(training)
    batch, loss = training.backward(0)
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    cockpit.observe(batch, loss)
    training.take_step()
    assert seeded == []
    assert readings(cockpit, "step/step_ratio", "ok")
    cockpit.close()


def test_an_exception_inside_a_reading_leaves_everything_as_it_was() -> None:
    """The user's own loss function fails half of the time when the cockpit calls it."""
    training = Training(Case("dropout", lambda: mlp(nn.Dropout(0.5), nn.BatchNorm1d(8))))
    calls: list[int] = []

    def losses(call: Any, batch: Any) -> Tensor:
        result = F.cross_entropy(call(batch[0]), batch[1], reduction="none")
        calls.append(1)
        if len(calls) % 2:
            raise KeyError("no such column")
        return result

    cockpit = watch(training, loss=losses)
    for step in range(4):
        batch, loss = training.backward(step)
        sides = training.model, training.optimizers
        before = [state_of(*sides), objects_of(*sides)]
        cockpit.observe(batch, loss)
        assert differences(before, [state_of(*sides), objects_of(*sides)]) == []
        training.take_step()
    assert "no such column" in readings(cockpit, "curvature/sharpness", "failed")[0].reason
    assert len(readings(cockpit, "gradient/norm", "ok")) == 4
    cockpit.close()


def scripted(observe: bool) -> tuple[dict[str, Tensor], list[Any]]:
    torch.manual_seed(0)
    inside = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))
    model = torch.jit.script(inside)
    optimizer, loss_fn, records = optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), list[Any]()
    how: dict[str, Any] = {"panel": "standard" if observe else None, "budget": None, "sinks": [records.append]}
    generator = torch.Generator().manual_seed(1)
    with Cockpit(model, optimizer, loss=loss_fn, **how) as cockpit:
        for _ in range(3):
            x, y = torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)
            loss = loss_fn(model(x), y)
            loss.backward()
            cockpit.observe((x, y), loss)
            optimizer.step()
            optimizer.zero_grad()
    return {name: t.clone() for name, t in model.state_dict().items()}, records


def test_torchscript_is_left_alone_and_refused_by_name() -> None:
    plain, _ = scripted(False)
    observed, records = scripted(True)
    assert all(torch.equal(plain[name], observed[name]) for name in plain)
    found = [r for r in records if getattr(r, "instrument", None)]
    assert {"batch/loss", "gradient/norm"} <= {r.instrument for r in found if r.status == "ok"}
    reasons = {r.instrument: r.reason for r in found if r.status == "failed"}
    assert {"curvature/sharpness", "gradient/noise_scale"} <= set(reasons)
    assert all("compiled by torch.jit" in reason for reason in reasons.values())
