"""Clips seen from inside a loop: which, by how much, how often; and what hides them."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn, optim

from cockpit_bench import Cockpit
from instruments.instrument import Estimate
from instruments.step.clipping import Clipping
from instruments.step.effective_learning_rate import EffectiveLearningRate

Clip = Callable[[nn.Module], object]


def train(clips: list[Clip | None], *, pool: int = 100, accumulate: int = 1) -> tuple[list[Any], list[float]]:
    """The readings of a loop that clips as it is told, step by step, and the norms just before its steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    loss_fn, readings, norms = nn.CrossEntropyLoss(), [], []
    with Cockpit(
        model, optimizer, loss=loss_fn, panel=None, sinks=[readings.append], budget=None, accumulate=accumulate,
        instruments={"clip": (Clipping(pool=pool), 1)}, strict=True,
    ) as cockpit:  # fmt: skip
        for clip in clips:
            for _ in range(accumulate):
                x, y = torch.randn(8, 3), torch.randint(2, (8,))
                loss = loss_fn(model(x), y)
                (loss / accumulate).backward()
                cockpit.observe((x, y), loss)
            if clip is not None:
                clip(model)
            norms.append(math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters())))
            optimizer.step()
            optimizer.zero_grad()
    return [r for r in readings if getattr(r, "instrument", None) == "clip"], norms


def by_norm(limit: float) -> Clip:
    return lambda model: nn.utils.clip_grad_norm_(model.parameters(), limit)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_clips_by_norm_are_counted_and_measured(accumulate: int) -> None:
    readings, norms = train([None, by_norm(0.01), None, by_norm(0.02), by_norm(1e9)], accumulate=accumulate)
    found = [r.values for r in readings]
    assert [v["clipped"] for v in found] == [0, 1, 0, 1, 0]
    assert [v["after"] for v in found] == pytest.approx(norms, rel=1e-5)
    assert found[1]["after"] == pytest.approx(0.01, rel=1e-3)
    for v in found:
        assert v["factor"] == (v["after"] / v["before"] if v["clipped"] else 1)
    assert [v["share"] for v in found] == pytest.approx([0, 1 / 2, 1 / 3, 2 / 4, 2 / 5])
    assert readings[-1].stderr["share"] == pytest.approx(math.sqrt(0.4 * 0.6 / 5))
    assert found[-1]["typical"] == pytest.approx((found[1]["factor"] + found[3]["factor"]) / 2)
    assert math.isnan(found[0]["typical"])


def test_clips_by_value_count_too() -> None:
    readings, _ = train([lambda model: nn.utils.clip_grad_value_(model.parameters(), 1e-3)])
    assert readings[0].values["clipped"] == 1
    assert readings[0].values["factor"] < 0.5


def test_only_the_last_readings_are_pooled() -> None:
    readings, _ = train([by_norm(0.01)] * 3 + [None] * 4, pool=4)
    assert [r.values["share"] for r in readings] == [1, 1, 1, 3 / 4, 2 / 4, 1 / 4, 0]


def test_gradients_that_are_not_finite_are_not_pooled() -> None:
    def spoil(model: Any) -> None:
        model[0].bias.grad[0] = math.nan

    readings, _ = train([by_norm(0.01), spoil])
    last = readings[-1].values
    assert math.isnan(last["clipped"])
    assert math.isnan(last["after"])
    assert math.isfinite(last["before"])
    assert last["share"] == 1


def norms(before: float, after: float) -> Any:
    """A double of the view: a gradient of one norm at observe, of another after the step."""
    return SimpleNamespace(
        gradient_norm=torch.tensor(before),
        used_grads=(torch.tensor([after]), None),
        optimizers=(),
        layout=SimpleNamespace(device=torch.device("cpu")),
    )


@pytest.mark.parametrize(
    ("before", "after", "clipped"), [(1.0, 0.5, 1), (1.0, 0.9995, 0), (1.0, 0.998, 1), (1.0, 2.0, 0), (0.0, 0.0, 0)]
)
def test_a_tenth_of_a_per_cent_is_rounding(before: float, after: float, clipped: float) -> None:
    values, state = Clipping().advance(norms(before, after), Clipping().init())
    assert values["clipped"] == clipped
    assert len(state["factors"]) == 1
    assert isinstance(values["share"], Estimate)


class DividesACopy(optim.SGD):
    """Takes the scale from a GradScaler and leaves `.grad` as it is."""

    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        scale = getattr(self, "grad_scale", None)
        for p in self.param_groups[0]["params"]:
            p -= 0.1 * p.grad / (1 if scale is None else scale)


OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "sgd": lambda params: optim.SGD(params, lr=0.1),
    "fused sgd": lambda params: optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "fused adam": lambda params: optim.Adam(params, lr=0.1, fused=True),
    "fused adagrad": lambda params: optim.Adagrad(params, lr=0.1, fused=True),
    "divides a copy": lambda params: DividesACopy(params, lr=0.1),
}


def train_scaled(kind: str, unscale: str, limit: float | None) -> tuple[list[Any], list[Any], list[float], list[float]]:
    """Readings of the clip and of the effective learning rate under a GradScaler; unscaled norms before and after."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer, scaler = OPTIMIZERS[kind](model.parameters()), torch.amp.GradScaler("cpu", init_scale=256.0)
    loss_fn, readings, before, after = nn.CrossEntropyLoss(), [], [], []

    def norm() -> float:
        scale = 256.0 if scaler._per_optimizer_states[id(optimizer)]["stage"].name == "READY" else 1.0
        return math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters())) / scale

    with Cockpit(
        model, optimizer, loss=loss_fn, panel=None, sinks=[readings.append], budget=None, scaler=scaler,
        instruments={"clip": (Clipping(), 1), "rate": (EffectiveLearningRate(), 1)},
    ) as cockpit:  # fmt: skip
        for _ in range(3):
            x, y = torch.randn(8, 3), torch.randint(2, (8,))
            loss = loss_fn(model(x), y)
            scaler.scale(loss).backward()
            before.append(norm())
            if unscale == "before observe":
                scaler.unscale_(optimizer)
            cockpit.observe((x, y), loss)
            if unscale == "after observe":
                scaler.unscale_(optimizer)
            if limit is not None:
                nn.utils.clip_grad_norm_(model.parameters(), limit)
            after.append(norm())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    clips, rates = ([r for r in readings if getattr(r, "instrument", None) == name] for name in ("clip", "rate"))
    return clips, rates, before, after


@pytest.mark.parametrize("kind", [kind for kind in OPTIMIZERS if kind != "divides a copy"])
@pytest.mark.parametrize(
    ("unscale", "limit"),
    [("before observe", 0.01), ("after observe", 0.01), ("after observe", None), ("by the step", None)],
)
def test_the_scale_is_in_neither_norm(kind: str, unscale: str, limit: float | None) -> None:
    clips, rates, before, after = train_scaled(kind, unscale, limit)
    assert [r.values["before"] for r in clips] == pytest.approx(before, rel=1e-4)
    assert [r.values["after"] for r in clips] == pytest.approx(after, rel=1e-4)
    assert [r.values["clipped"] for r in clips] == [float(limit is not None)] * 3
    if kind == "sgd":
        assert [float(r.values["multiple"][0]) for r in rates] == pytest.approx([1, 1, 1], rel=1e-3)
    else:
        assert [r.status for r in rates] == ["ok"] * 3


def test_a_clip_of_scaled_gradients_is_seen_in_the_unit_of_the_loss() -> None:
    """Clipped at 0.01 while the scale of 256 was still in: the step used 0.01 / 256."""
    clips, rates, _, _ = train_scaled("sgd", "by the step", 0.01)
    assert [r.values["after"] for r in clips] == pytest.approx([0.01 / 256] * 3, rel=1e-3)
    assert [float(r.values["multiple"][0]) for r in rates] == pytest.approx(
        [1, 1, 1], rel=0.02
    )  # tiny steps in float32


def test_an_optimizer_that_may_leave_the_scale_in_is_refused() -> None:
    for r in [r for some in train_scaled("divides a copy", "by the step", None)[:2] for r in some]:
        assert r.status == "failed"
        assert "call scaler.unscale_(optimizer) before the step" in r.reason
    clips, rates, before, _ = train_scaled("divides a copy", "after observe", None)
    assert [r.values["after"] for r in clips] == pytest.approx(before, rel=1e-4)
    assert [float(r.values["multiple"][0]) for r in rates] == pytest.approx([1, 1, 1], rel=1e-3)


def test_a_pool_of_nothing_is_misuse() -> None:
    with pytest.raises(ValueError, match="pool of at least 1"):
        Clipping(pool=0)
