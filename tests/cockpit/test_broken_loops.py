"""Loops that do what no loop should: steps that raise, and an optimizer that is replaced while the cockpit looks on."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loop_cases import Case, Training, mlp, rows
from torch import Tensor
from watching import events, readings, values, watch

from cockpit_bench import Cockpit

PLAIN = Case("plain", mlp)


def norm_of(training: Training) -> float:
    grads = [p.grad.flatten() for p in training.model.parameters() if p.grad is not None]
    return float(torch.cat(grads).norm())


def test_a_closure_that_raises_leaves_nothing_to_the_next_step() -> None:
    """Both ends of every reading are of one step, and the one that was not taken is an event."""
    training, norms = Training(PLAIN), []
    (optimizer,) = training.optimizers
    instruments = {"gradient/norm": 1, "step/update_ratio": 1, "step/clipping": 1}
    cockpit = watch(training, panel=None, instruments=instruments)

    def closure(step: int) -> Tensor:
        optimizer.zero_grad()
        batch, loss = training.backward(step)
        cockpit.observe(batch, loss)
        if step == 1:
            raise RuntimeError("out of memory")
        norms.append(norm_of(training))
        return loss

    for step in range(4):
        try:
            optimizer.step(lambda step=step: closure(step))
        except RuntimeError:
            continue
    cockpit.close()
    read = values(cockpit, "gradient/norm", "norm")
    assert [read[0], *read[2:]] == pytest.approx(norms)
    assert [r.step for r in readings(cockpit, "step/update_ratio")] == [0, 1, 2]
    assert len(events(cockpit, "skipped_step")) == 1
    assert not events(cockpit, "clip")
    assert cockpit.step == 3


def test_a_step_that_raises_is_not_taken_for_the_next_one() -> None:
    class Flaky(torch.optim.SGD):
        calls = 0

        def step(self, closure: Any = None) -> Any:
            self.calls += 1
            if self.calls == 2:
                raise RuntimeError("a bad step")
            return super().step(closure)

    training = Training(Case("flaky", mlp, lambda model: [Flaky(model.parameters(), lr=0.1)]))
    cockpit = watch(training, panel=None, instruments={"gradient/norm": 1, "step/update_ratio": 1})
    for step in range(5):
        batch, loss = training.backward(step)
        cockpit.observe(batch, loss)
        norm = norm_of(training)
        try:
            training.take_step()
        except RuntimeError:
            training.optimizers[0].zero_grad()
            continue
        assert cockpit.last["gradient/norm"]["norm"] == pytest.approx(norm)
        assert cockpit.last["step/update_ratio"]["update_norm"] == pytest.approx(0.1 * norm, rel=1e-4)
    outcome = cockpit.close()
    assert outcome is not None
    assert outcome.step == 4
    assert len(events(cockpit, "skipped_step")) == 1


def test_a_step_that_calls_the_step_of_its_parent_is_one_step() -> None:
    """torch puts the hooks round both; what the class does after its parent is of the step, too."""

    class Shrinking(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            with torch.no_grad():
                for group in self.param_groups:
                    torch._foreach_mul_(group["params"], 0.5)
            return result

    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)  # from here on torch has wrapped the step of SGD
    training = Training(Case("subclass", mlp, lambda model: [Shrinking(model.parameters(), lr=0.1)]))
    cockpit = watch(training, panel=None, instruments={"step/update_ratio": 1})
    for step in range(3):
        before = [p.detach().clone() for p in training.model.parameters()]
        cockpit.observe(*training.backward(step))
        training.take_step()
        moved = torch.cat(
            [(p.detach() - q).flatten() for p, q in zip(training.model.parameters(), before, strict=True)]
        )
        assert cockpit.last["step/update_ratio"]["update_norm"] == pytest.approx(float(moved.norm()), rel=1e-5)
    cockpit.close()
    assert cockpit.step == 3
    assert [r.step for r in readings(cockpit, "step/update_ratio", "ok")] == [0, 1, 2]


def swapped(lr: float, back_at: int) -> Cockpit:
    """Adam for two steps, then SGD that nobody told the cockpit of, and Adam again from `back_at`."""
    training = Training(Case("swapped", mlp, lambda model: [torch.optim.Adam(model.parameters())]))
    others = [torch.optim.SGD(training.model.parameters(), lr=lr)]
    names = ("gradient/norm", "step/learning_rate", "step/update_ratio", "curvature/preconditioned_sharpness")
    cockpit = watch(training, panel=None, instruments=dict.fromkeys(names, 1))
    for step in range(9):
        batch = rows(step)
        loss = F.cross_entropy(training.model(batch[0]), batch[1])
        loss.backward()
        cockpit.observe(batch, loss)
        for optimizer in others if 2 <= step < back_at else training.optimizers:
            optimizer.step()
            optimizer.zero_grad()
    cockpit.close()
    return cockpit


def test_an_optimizer_that_was_replaced_is_named_and_no_longer_read() -> None:
    cockpit = swapped(5.0, back_at=99)
    (event,) = events(cockpit, "optimizer_replaced")
    assert event.step == 2
    assert "another one has taken its place" in event.detail["reason"]
    for label in ("step/learning_rate", "curvature/preconditioned_sharpness"):
        assert [r.step for r in readings(cockpit, label, "ok")] == [0, 1, 2, 2]
        assert "another one has taken its place" in readings(cockpit, label, "failed")[0].reason
    assert [r.step for r in readings(cockpit, "gradient/norm", "ok")] == [0, 1, 2, *range(2, 8)]
    assert [r.step for r in readings(cockpit, "step/update_ratio", "ok")] == [0, 1, *range(2, 8)]
    assert cockpit.step == 8, "the first step of the other one is not counted: it may have been none"


def test_an_optimizer_that_comes_back_is_read_again() -> None:
    """However long it was away: what was refused meanwhile does not retire."""
    cockpit = swapped(0.1, back_at=7)
    assert len(events(cockpit, "optimizer_replaced")) == 1
    assert not events(cockpit, "retired")
    assert [r.step for r in readings(cockpit, "step/learning_rate", "ok")] == [0, 1, 2, 2, 7]
    assert len(readings(cockpit, "step/learning_rate", "failed")) == 1


def test_weights_that_are_clamped_after_a_skipped_step_are_no_other_optimizer() -> None:
    training = Training(PLAIN)
    cockpit = watch(training, panel=None, instruments={"step/learning_rate": 1, "gradient/norm": 1})
    for step in range(6):
        cockpit.observe(*training.backward(step))
        if step in (2, 4):
            for p in training.model.parameters():
                p.grad = None
                with torch.no_grad():
                    p.clamp_(-0.1, 0.1)
        else:
            training.take_step()
    cockpit.close()
    assert not events(cockpit, "optimizer_replaced")
    assert len(events(cockpit, "skipped_step")) == 2
    assert len(readings(cockpit, "step/learning_rate", "ok")) == 6
    assert cockpit.step == 4
