"""Angle between successive gradients, and between step and gradient: by hand, by layer, and over real optimizers."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import Built
from taking import SOME, case, mean_of, take
from torch import Tensor, nn, optim
from twins import trainable

from instruments import Probe, Refusal, View
from instruments.gradient.angle import Angle
from instruments.gradient.step_cosine import StepCosine
from instruments.objective import as_objective


def cosine(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Between two lists of tensors, number by number."""
    a, b = ([x for t in side for x in t.flatten().tolist()] for side in zip(*pairs, strict=True))
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    size = (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5
    return dot / size if size else float("nan")


def grads_of(built: Built) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trainable(built.model).values()]


@pytest.mark.parametrize("name", SOME)
def test_cosine_of_two_gradients(name: str) -> None:
    built = case(name)
    before = grads_of(built)
    _, state, _ = take(Angle(), built, step=3)
    for p in trainable(built.model).values():
        if p.grad is not None:
            p.grad.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=p.dtype))
    values, _, _ = take(Angle(), built, state=state, step=8)
    pairs = list(zip(grads_of(built), before, strict=True))
    assert float(values["cosine"]) == pytest.approx(cosine(pairs), rel=1e-10)
    assert float(values["angle"]) == pytest.approx(np.degrees(np.arccos(cosine(pairs))), rel=1e-10)
    expected = [cosine([pair]) for pair in pairs]
    assert values["per_layer"].tolist() == pytest.approx(expected, rel=1e-10, nan_ok=True)
    assert values["steps_apart"] == 5


def with_grad(*grads: Tensor) -> Built:
    model = nn.ParameterList([nn.Parameter(torch.zeros_like(g)) for g in grads])
    for p, g in zip(model, grads, strict=True):
        p.grad = g
    return Built(model, nn.MSELoss(), (torch.zeros(1), torch.zeros(1)))


def test_opposite_gradients_and_the_first_reading() -> None:
    g = torch.tensor([1.0, 2.0])
    values, state, _ = take(Angle(), with_grad(g))
    assert np.isnan([float(values["cosine"]), float(values["angle"]), values["steps_apart"]]).all()
    assert values["per_layer"].isnan().tolist() == [True]
    g.zero_()  # what the loop does next to `.grad` does not reach the memory
    values, _, _ = take(Angle(), with_grad(torch.tensor([-2.0, -4.0])), state=state, step=1)
    assert float(values["angle"]) == pytest.approx(180)


def test_memory_goes_through_a_checkpoint_and_not_to_another_model() -> None:
    _, state, _ = take(Angle(), with_grad(torch.ones(2), torch.ones(3)))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    restored = torch.load(file, weights_only=True)
    again = with_grad(torch.ones(2), torch.ones(3))
    assert float(take(Angle(), again, state=restored)[0]["cosine"]) == pytest.approx(1)
    other, _, _ = take(Angle(), with_grad(torch.ones(3), torch.ones(2)), state=restored)
    assert float(other["cosine"]) == pytest.approx(1)  # same names, other shapes, as many elements
    grown, after, _ = take(Angle(), with_grad(torch.ones(2), torch.ones(3), torch.ones(1)), state=restored)
    assert np.isnan(float(grown["cosine"]))
    assert len(after["previous_D"]) == 6


def test_independent_batches_have_the_cosine_that_the_noise_allows() -> None:
    """E cos of two batch gradients is about 1/(1 + B_simple/B); here 1/(1 + 2)."""
    generator, state, found = torch.Generator().manual_seed(0), None, []
    for step in range(80):
        noise = torch.randn(200, generator=generator, dtype=torch.float64)
        values, state, _ = take(Angle(), with_grad(0.5**0.5 + noise), state=state, step=step)
        found.append(float(values["cosine"]))
    assert np.mean(found[1:]) == pytest.approx(1 / 3, abs=0.03)


def test_a_gradient_that_is_not_finite_is_data() -> None:
    _, state, _ = take(Angle(), with_grad(torch.ones(2)))
    values, state, _ = take(Angle(), with_grad(torch.tensor([1.0, torch.nan])), state=state)
    assert np.isnan(float(values["cosine"]))
    _, state, _ = take(Angle(), with_grad(torch.ones(2)), state=state)
    assert float(take(Angle(), with_grad(torch.ones(2)), state=state)[0]["cosine"]) == pytest.approx(1)


def test_tiny_gradients_keep_their_angle_and_complex_ones_have_none() -> None:
    """Squares of 1e-25 are below the range of float32."""
    g = 1e-25 * torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    _, state, _ = take(Angle(), with_grad(g))
    values, _, _ = take(Angle(), with_grad(g.flip(0) + g), state=state)
    assert float(values["cosine"]) == pytest.approx(0.5**0.5, rel=0.01)
    built = with_grad(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(Refusal, match="complex"):
        take(Angle(), built)
    with pytest.raises(Refusal, match="complex"):
        take(StepCosine(), built, move=lambda: None)


OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "decay": lambda p: optim.SGD(p, lr=0.1, weight_decay=0.3),
    "adam": lambda p: optim.Adam(p, lr=1e-2),
    "ascent": lambda p: optim.SGD(p, lr=0.1, maximize=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["mlp", "tied_attention", "called_twice_unused", "frozen"])
def test_cosine_of_a_step(name: str, optimizer: str) -> None:
    built = case(name)
    params = list(trainable(built.model).values())
    made = OPTIMIZERS[optimizer](params)
    made.step()
    for p in params:
        if p.grad is not None:
            p.grad.add_(0.1)
    before = [p.detach().clone() for p in params]
    values, _, _ = take(StepCosine(), built, [made], move=made.step)
    pairs = [(p.detach() - p0, -g) for p, p0, g in zip(params, before, grads_of(built), strict=True)]
    assert float(values["cosine"]) == pytest.approx(cosine(pairs), rel=1e-9)
    expected = [cosine([pair]) for pair in pairs]
    assert values["per_layer"].tolist() == pytest.approx(expected, rel=1e-7, nan_ok=True)
    if optimizer in ("sgd", "ascent"):
        assert float(values["cosine"]) == pytest.approx(1.0 if optimizer == "sgd" else -1.0)


def test_neither_scale_nor_clipping_by_norm_changes_it() -> None:
    built = case("mlp")
    params = list(built.model.parameters())
    optimizer = optim.Adam(params, lr=1e-2)
    probe = Probe(built.model, as_objective(built.loss), [optimizer], [built.batch], loss_scale=8.0)
    probe.remember()
    g = grads_of(built)
    before = [p.detach().clone() for p in params]
    nn.utils.clip_grad_norm_(params, 1e-3)
    optimizer.step()
    with probe:
        values = StepCosine().read(View(probe, StepCosine.needs))
    expected = cosine([(p.detach() - p0, -h) for p, p0, h in zip(params, before, g, strict=True)])
    assert float(values["cosine"]) == pytest.approx(expected)  # type: ignore[arg-type]


def test_a_step_that_was_not_taken_has_no_direction() -> None:
    values, _, _ = take(StepCosine(), case("mlp"), move=lambda: None)
    assert np.isnan(float(values["cosine"]))
    assert values["per_layer"].isnan().all()


def test_without_gradients_both_are_refused() -> None:
    built = mean_of(torch.ones(2, 2, dtype=torch.float64))
    with pytest.raises(Refusal, match="no parameter has a gradient"):
        take(Angle(), built)
    with pytest.raises(Refusal, match="no parameter has a gradient"):
        take(StepCosine(), built, move=lambda: None)
