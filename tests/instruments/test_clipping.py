"""Clips seen from inside a loop: which, by how much, how often; and what hides them."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn, optim

from cockpit_bench import Cockpit
from instruments import Refusal
from instruments.instrument import Estimate
from instruments.step.clipping import Clipping

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


def norms(before: float, after: float, scaled: str = "no") -> Any:
    """A double of the view: a gradient of one norm at observe, of another after the step."""
    return SimpleNamespace(
        gradient_norm=torch.tensor(before),
        grads=(torch.tensor([after]), None),
        optimizers=(),
        layout=SimpleNamespace(device=torch.device("cpu")),
        meter=SimpleNamespace(provenance={"scaled": scaled}),
    )


@pytest.mark.parametrize(
    ("before", "after", "clipped"), [(1.0, 0.5, 1), (1.0, 0.9995, 0), (1.0, 0.998, 1), (1.0, 2.0, 0), (0.0, 0.0, 0)]
)
def test_a_tenth_of_a_per_cent_is_rounding(before: float, after: float, clipped: float) -> None:
    values, state = Clipping().advance(norms(before, after), Clipping().init())
    assert values["clipped"] == clipped
    assert len(state["factors"]) == 1
    assert isinstance(values["share"], Estimate)


def test_what_a_scaler_may_have_divided_is_refused() -> None:
    with pytest.raises(Refusal, match="unscale_"):
        Clipping().advance(norms(8.0, 1.0, "unscaled from 8"), Clipping().init())


def test_a_pool_of_nothing_is_misuse() -> None:
    with pytest.raises(ValueError, match="pool of at least 1"):
        Clipping(pool=0)
