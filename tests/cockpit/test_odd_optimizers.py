"""Closures, optimizers without torch's hooks, several optimizers on one model, and steps that nobody observed."""

from typing import Any

import pytest
import torch
from loop_cases import Case, Training, mlp, rows, two_optimizers
from refusals import check_failed
from torch import Tensor, nn, optim
from watching import events, readings, values, watch

from cockpit_bench.testing.traces import differences, state_of

PLAIN = Case("plain", mlp)


def lbfgs(model: nn.Module) -> list[Any]:
    return [optim.LBFGS(model.parameters(), lr=0.5, max_iter=4, line_search_fn="strong_wolfe")]


class SignDescent:
    """An optimizer of the user's own: parameter groups and a step, nothing of torch's."""

    def __init__(self, model: nn.Module) -> None:
        self.param_groups = [{"params": list(model.parameters()), "lr": 0.01}]

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] * p.grad.sign()

    def zero_grad(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad = None


def closure_run(*, enabled: bool, steps: int = 4) -> tuple[Training, Any, list[list[float]]]:
    """LBFGS, observed inside its closure; returns the losses of every evaluation by step."""
    training = Training(Case("lbfgs", lambda: mlp(nn.Dropout(0.2)), lbfgs))
    cockpit = watch(training, enabled=enabled)
    (optimizer,) = training.optimizers
    evaluations: list[list[float]] = []
    for step in range(steps):
        batch = rows(step)
        evaluations.append([])

        def closure(batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = training.case.loss(training.model(batch[0]), batch[1])
            loss.backward()
            evaluations[-1].append(loss.item())
            cockpit.observe(batch, loss)
            return loss

        optimizer.step(closure)
    return training, cockpit, evaluations


def test_a_closure_is_observed_at_its_first_evaluation() -> None:
    training, cockpit, evaluations = closure_run(enabled=True)
    assert all(len(losses) > 1 for losses in evaluations), "the test needs a step of several evaluations"
    assert cockpit.step == 4
    assert values(cockpit, "batch/loss", "loss") == pytest.approx([losses[0] for losses in evaluations])
    assert [r.step for r in readings(cockpit, "gradient/norm")] == [0, 1, 2, 3]
    assert [r.step for r in readings(cockpit, "step/step_ratio", "ok")] == [0, 1, 2, 3]
    assert not events(cockpit, "skipped_step")
    refused = readings(cockpit, status="failed")
    check_failed(training, {r.instrument: r.reason for r in refused})
    assert any("LBFGS" in r.reason for r in refused if r.instrument == "curvature/preconditioned_sharpness")
    cockpit.close()


def test_a_closure_trains_the_same_with_and_without() -> None:
    ends = []
    for enabled in (False, True):
        training, cockpit, evaluations = closure_run(enabled=enabled)
        ends.append([evaluations, state_of(training.model, training.optimizers)])
        cockpit.close()
    assert differences(ends[0], ends[1]) == []


def hookless(**settings: Any) -> tuple[Training, Any]:
    training = Training(Case("hookless", mlp, lambda model: [SignDescent(model)]))
    return training, watch(training, **settings)


def moved(training: Training, before: list[Tensor]) -> float:
    pairs = zip(training.model.parameters(), before, strict=True)
    return float(torch.stack([(p.detach() - b).norm() for p, b in pairs]).norm())


@pytest.mark.parametrize("noticed_by", ["observe", "evaluating", "state_dict", "close"])
def test_a_step_without_hooks_is_noticed_at_the_next_call(noticed_by: str) -> None:
    training, cockpit = hookless()
    before = [p.detach().clone() for p in training.model.parameters()]
    cockpit.observe(*training.backward(0))
    training.take_step()
    length = moved(training, before)
    assert not readings(cockpit, "step/step_ratio")
    if noticed_by == "observe":
        cockpit.observe(*training.backward(1))
    elif noticed_by == "evaluating":
        with cockpit.evaluating() as log:
            log(accuracy=0.5)
    elif noticed_by == "state_dict":
        assert cockpit.state_dict()["step"] == 1
    if noticed_by != "close":
        assert cockpit.step == 1
        assert len(readings(cockpit, "step/step_ratio", "ok")) == 1
    cockpit.close()
    first = readings(cockpit, "step/step_ratio", "ok")[0]
    assert first.step == 0
    assert first.values["update_norm"] == pytest.approx(length, rel=1e-4)


def test_a_run_without_hooks_counts_its_steps() -> None:
    training, cockpit = hookless()
    training.run(5, cockpit.observe)
    outcome = cockpit.close()
    assert outcome is not None
    assert outcome.step == 5
    assert [r.step for r in readings(cockpit, "gradient/norm")] == [0, 1, 2, 3, 4]
    assert [r.step for r in readings(cockpit, "step/step_ratio")] == [0, 1, 2, 3, 4]
    assert not events(cockpit, "skipped_step")
    check_failed(training, {r.instrument: r.reason for r in readings(cockpit, status="failed")})


def test_a_run_without_hooks_trains_the_same_with_and_without() -> None:
    ends = []
    for enabled in (False, True):
        training, cockpit = hookless(enabled=enabled)
        training.run(5, cockpit.observe)
        ends.append([training.losses, state_of(training.model, ())])
        cockpit.close()
    assert differences(ends[0], ends[1]) == []


def test_a_step_is_closed_by_the_last_of_several_optimizers() -> None:
    training = Training(Case("two", mlp, two_optimizers))
    cockpit = watch(training)
    first, second = training.optimizers
    cockpit.observe(*training.backward(0))
    first.step()
    assert cockpit.step == 0
    assert not readings(cockpit, "step/step_ratio")
    second.step()
    assert cockpit.step == 1
    (reading,) = readings(cockpit, "step/step_ratio", "ok")
    assert reading.step == 0
    assert len(values(cockpit, "step/learning_rate", "learning_rate")[0]) == 2
    cockpit.close()


def test_an_optimizer_that_rests_does_not_hold_up_the_count() -> None:
    """One of two optimizers steps at every second step only, as critics and slow embeddings do."""
    training = Training(Case("two", mlp, two_optimizers))
    cockpit = watch(training)
    for step in range(4):
        cockpit.observe(*training.backward(step))
        training.optimizers[0].step()
        if step % 2:
            training.optimizers[1].step()
        training.model.zero_grad()
    assert cockpit.step == 4
    assert [r.step for r in readings(cockpit, "gradient/norm")] == [0, 1, 2, 3]
    assert not events(cockpit, "skipped_step")
    cockpit.close()


def test_steps_that_nobody_observed_count() -> None:
    training = Training(PLAIN)
    cockpit = watch(training)
    for step in range(9):
        batch, loss = training.backward(step)
        if step % 4 == 0:
            cockpit.observe(batch, loss)
        training.take_step()
    assert cockpit.step == 9
    assert [r.step for r in readings(cockpit, "gradient/norm")] == [0, 4, 8]
    cockpit.close()


def test_a_step_that_the_user_left_out_is_an_event() -> None:
    training = Training(PLAIN)
    cockpit = watch(training)
    for step in range(4):
        cockpit.observe(*training.backward(step))
        if step != 1:
            training.take_step()
        training.model.zero_grad()
    assert [event.step for event in events(cockpit, "skipped_step")] == [1]
    assert cockpit.step == 3
    cockpit.close()


@pytest.mark.parametrize("wrong", [[], (), None, "sgd", [object()], mlp()])
def test_what_is_no_optimizer(wrong: Any) -> None:
    training = Training(PLAIN)
    training.optimizers = wrong
    with pytest.raises(ValueError, match=r"expected an optimizer|expected at least one optimizer"):
        watch(training)
