"""Loss scales, steps that a GradScaler skips, and clipping between observe and step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loop_cases import Case, Training, case_named, mlp, rows
from torch import nn, optim
from watching import events, readings, values, watch

from cockpit_bench import Cockpit
from cockpit_bench.testing.traces import differences, state_of
from instruments.layout import total_norm

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


def big() -> nn.Module:
    """Large enough for its gradients to be sampled instead of measured twice; convolution in channels-last layout."""
    first = nn.Sequential(nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, 600, 1), nn.Flatten(), nn.Tanh())
    return nn.Sequential(first.to(memory_format=torch.channels_last), nn.Linear(600, 600), nn.Tanh(), nn.Linear(600, 3))


BIG = Case("big", big)
C = 0.3


def assigned(p: nn.Parameter) -> None:
    assert p.grad is not None
    p.grad = p.grad * C


def swapped(p: nn.Parameter) -> None:
    assert p.grad is not None
    p.grad.data = p.grad * C


SCALINGS: dict[str, Callable[[Any], object]] = {
    "in place": lambda p: p.grad.mul_(C),
    "in place, detached": lambda p: p.grad.detach().mul_(C),
    "through a view": lambda p: p.grad.view_as(p.grad).mul_(C),
    "past the counter": lambda p: p.grad.data.mul_(C),
    "past the counter, fused": lambda p: torch._foreach_mul_([p.grad.data], C),
    "by numpy": lambda p: p.grad.numpy().__imul__(C),
    "assigned": assigned,
    "data assigned": swapped,
}


def clipped_run(clip: Callable[[list[nn.Parameter]], object], **settings: Any) -> tuple[Cockpit, float, float]:
    """One step of the big model; the norms before and after by another route."""
    training = Training(BIG)
    cockpit = watch(training, panel="light", **settings)
    cockpit.observe(*training.backward(0))
    params = list(training.model.parameters())

    def norm() -> float:
        return sum(float((p.grad.double() ** 2).sum()) for p in params if p.grad is not None) ** 0.5

    before = norm()
    clip(params)
    after = norm()
    training.take_step()
    cockpit.close()
    return cockpit, before, after


@pytest.fixture
def second_norms(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every full norm that the clip watch takes."""
    taken: list[int] = []

    def counted(grads: Any) -> Any:
        taken.append(len(grads))
        return total_norm(grads)

    monkeypatch.setattr("cockpit_bench.clip_watch.total_norm", counted)
    return taken


@pytest.mark.parametrize("way", SCALINGS)
def test_scaling_is_seen_whatever_way_it_is_written(way: str) -> None:
    cockpit, before, after = clipped_run(lambda params: [SCALINGS[way](p) for p in params])
    (event,) = events(cockpit, "clip")
    assert after == pytest.approx(C * before)
    assert (event.detail["before"], event.detail["after"]) == pytest.approx((before, after), rel=1e-5)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("by", ["norm", "value"])
def test_the_clips_of_torch_are_seen(by: str, foreach: bool) -> None:
    clip = nn.utils.clip_grad_norm_ if by == "norm" else nn.utils.clip_grad_value_
    cockpit, before, after = clipped_run(lambda params: clip(params, 1e-3, foreach=foreach))
    (event,) = events(cockpit, "clip")
    assert after < before / 2
    assert (event.detail["before"], event.detail["after"]) == pytest.approx((before, after), rel=1e-4)


def test_clipping_one_tensor_alone_is_seen() -> None:
    cockpit, before, after = clipped_run(lambda params: params[2].grad.zero_())  # type: ignore[union-attr]
    (event,) = events(cockpit, "clip")
    assert (event.detail["before"], event.detail["after"]) == pytest.approx((before, after), rel=1e-5)


def test_a_sample_of_zeros_is_no_evidence(second_norms: list[int]) -> None:
    """All that is sampled vanishes, and the rest is scaled past the counter."""
    training = Training(BIG)
    cockpit = watch(training, panel="light")
    batch, loss = training.backward(0)
    for p in training.model.parameters():
        assert p.grad is not None
        p.grad.zero_()
    last = list(training.model.parameters())[2].grad
    assert last is not None
    last[1, 1] = 1.0
    cockpit.observe(batch, loss)
    last.data.mul_(C)
    training.take_step()
    (event,) = events(cockpit, "clip")
    assert (event.detail["before"], event.detail["after"]) == pytest.approx((1.0, C))
    assert len(second_norms) == 1
    cockpit.close()


def test_an_unclipped_step_takes_no_second_norm(second_norms: list[int]) -> None:
    training = Training(BIG)
    cockpit = watch(training, panel="light")
    training.run(3, cockpit.observe)
    assert not second_norms
    cockpit.observe(*training.backward(3))
    nn.utils.clip_grad_norm_(training.model.parameters(), 1e9)
    training.take_step()
    assert len(second_norms) == 1, "the counter moved, so somebody wrote; whether anything changed is measured"
    assert not events(cockpit, "clip")
    cockpit.close()


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_between_observe_and_step_is_neither_a_clip_nor_a_second_norm(
    fused: bool, second_norms: list[int]
) -> None:
    """A fused optimizer takes scaled gradients; for any other they are unscaled first, past the version counter."""
    case = Case("big", big, FUSED.optimizers) if fused else BIG
    training = Training(case)
    (optimizer,) = training.optimizers
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    cockpit = watch(training, scaler=scaler, panel="light")
    for step in range(3):
        batch = rows(step)
        loss = case.loss(training.model(batch[0]), batch[1])
        scaler.scale(loss).backward()
        cockpit.observe(batch, loss)
        if not fused:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert cockpit.step == 3
    assert not events(cockpit, "clip")
    assert not second_norms
    cockpit.close()


@pytest.mark.parametrize("width", [4, 600])
def test_the_host_waits_for_no_single_parameter(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers fetched from tensors in the steps of the panel `light`: as many for two layers as for twenty."""
    fetched: list[str] = []

    def counting(name: str) -> Callable[..., Any]:
        original = getattr(torch.Tensor, name)

        def call(self: Any, *args: Any) -> Any:
            fetched.append(name)
            return original(self, *args)

        return call

    for name in ("item", "tolist", "numpy", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, counting(name))
    numbers = []
    for layers in (2, 20):
        middle = [nn.Linear(width, width) for _ in range(layers)]
        model = nn.Sequential(nn.Linear(6, width), *middle, nn.Linear(width, 3))
        optimizer = optim.SGD(model.parameters(), lr=0.01)
        cockpit = Cockpit(model, optimizer, loss=nn.CrossEntropyLoss(), panel="light", budget=None, sinks=())
        for step in range(11):
            loss = nn.functional.cross_entropy(model(rows(step)[0]), rows(step)[1])
            loss.backward()
            if step == 10:
                fetched.clear()
            cockpit.observe(rows(step), loss)
            optimizer.step()
            optimizer.zero_grad()
        numbers.append(list(fetched))
        cockpit.close()
    assert numbers[0] == numbers[1]
    assert numbers[0]


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
