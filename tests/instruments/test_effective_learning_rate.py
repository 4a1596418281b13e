"""Length of the step by parameter group, over the gradient and over the learning rate, against plain sums."""

import math
from typing import Any

import pytest
import torch
from cases import BY_NAME, CASES, Built, Case, build
from loops import read_after_step, run
from torch import Tensor, nn, optim
from twins import trainable

from instruments import Probe, Refusal, View
from instruments.objective import as_objective
from instruments.optimizer.update_scale import UpdateScale
from instruments.step.effective_learning_rate import EffectiveLearningRate

RATES = (0.1, 0.02)
KINDS: dict[str, Any] = {
    "sgd": lambda groups: optim.SGD(groups),
    "momentum": lambda groups: optim.SGD(groups, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda groups: optim.SGD(groups, momentum=0.9, nesterov=True),
    "adam": lambda groups: optim.Adam(groups),
    "adamw_amsgrad": lambda groups: optim.AdamW(groups, amsgrad=True, weight_decay=0.3),
    "rmsprop": lambda groups: optim.RMSprop(groups),
}


def two_groups(model: nn.Module, kind: str) -> optim.Optimizer:
    """The first trained tensor, the others, and a group of something that is not trained."""
    first, *rest = trainable(model).values()
    frozen = {"params": [nn.Parameter(torch.ones(2), requires_grad=False)], "lr": 1.0}
    return KINDS[kind]([{"params": [first], "lr": RATES[0]}, {"params": rest, "lr": RATES[1]}, frozen])


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(x) ** 2 for t in tensors for x in t.flatten()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["mlp", "cnn", "tied_attention", "recurrent", "called_twice_unused", "frozen"])
@pytest.mark.parametrize("steps", [0, 3])
def test_by_group_and_by_layer(kind: str, case: str, steps: int) -> None:
    built = build(BY_NAME[case])
    params = list(trainable(built.model).values())
    optimizer = two_groups(built.model, kind)
    loop = run(built, [optimizer], steps)
    before = [p.detach().clone() for p in params]
    grads = [torch.zeros(1) if p.grad is None else p.grad.clone() for p in params]
    probe = loop.probe()
    probe.remember()
    optimizer.step()
    with probe:
        values = EffectiveLearningRate().read(View(probe, EffectiveLearningRate.needs))
        scale = UpdateScale().read(View(probe, UpdateScale.needs))
    moved = [p.detach() - p0 for p, p0 in zip(params, before, strict=True)]
    across = []
    for u, theta in zip(moved, before, strict=True):
        along = float((u * theta).sum()) / norm([theta]) if norm([theta]) else 0.0
        across.append(math.sqrt(max(0.0, norm([u]) ** 2 - along**2)))
    per_layer = [over(a, norm([theta])) for a, theta in zip(across, before, strict=True)]
    close(values["angular_per_layer"], per_layer, abs=1e-7)
    for group, part in enumerate((slice(0, 1), slice(1, None))):
        ratio = over(norm(moved[part]), norm(grads[part]))
        close(values["ratio"][group], ratio)
        close(values["multiple"][group], ratio / RATES[group])
        close(values["angular"][group], math.hypot(*across[part]) / norm(before[part]))
        size = sum(u.numel() for u in moved[part])
        close(scale["rms"][group], norm(moved[part]) / math.sqrt(size) / RATES[group])
        close(scale["largest"][group], max(float(u.abs().max()) for u in moved[part]) / RATES[group])
    for name in ("ratio", "multiple", "angular"):
        assert values[name][2].isnan()
    assert scale["rms"][2].isnan()
    assert scale["largest"][2].isnan()


def over(length: float, other: float) -> float:
    return length / other if other else math.inf if length else math.nan


def close(found: Tensor, expected: Any, abs: float = 1e-12) -> None:
    assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=abs, nan_ok=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_plain_descent_has_its_own_learning_rate(case: Case) -> None:
    built = build(case)
    loop = run(built, [optim.SGD(built.model.parameters(), lr=0.3)], 1)
    values = read_after_step(loop, EffectiveLearningRate())
    assert float(values["ratio"][0]) == pytest.approx(0.3, rel=1e-6)
    assert float(values["multiple"][0]) == pytest.approx(1, rel=1e-6)


def test_adam_moves_by_the_learning_rate_at_first() -> None:
    built = build(BY_NAME["mlp"])
    values = read_after_step(run(built, [optim.Adam(built.model.parameters(), eps=0)], 0), UpdateScale())
    assert float(values["rms"][0]) == pytest.approx(1, rel=1e-6)
    assert float(values["largest"][0]) == pytest.approx(1, rel=1e-6)


def test_a_parameter_without_an_element_has_no_largest_entry() -> None:
    model = nn.Module()
    model.weight, model.nothing = nn.Parameter(torch.ones(2).double()), nn.Parameter(torch.zeros(0, 3).double())
    built = Built(model, lambda call, x: x @ model.weight, torch.tensor([[3.0, -4.0]]).double())
    values = read_after_step(run(built, [optim.SGD(model.parameters(), lr=0.1)], 0), UpdateScale())
    assert values["largest"].tolist() == pytest.approx([4])
    assert values["rms"].tolist() == pytest.approx([12.5**0.5])


class Normalized(nn.Module):
    """Scale-invariant weights: the gradient has no part along them, and decay no part across."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.linspace(-1, 2, 6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.theta / self.theta.norm())


def test_the_angle_settles_where_decay_and_learning_rate_say() -> None:
    """sqrt(2 eta lambda) for SGD on scale-invariant weights in noise: the mean of 2000 steps, to 5 %."""
    torch.manual_seed(0)
    model = Normalized()
    optimizer = optim.SGD(model.parameters(), lr=0.05, weight_decay=0.1)
    found = []
    for t in range(3000):
        model.zero_grad()
        x, y = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
        nn.functional.mse_loss(model(x), y).backward()
        probe = Probe(model, as_objective(nn.MSELoss()), [optimizer], [(x, y)])
        probe.remember()
        optimizer.step()
        if t >= 1000:
            with probe:
                values = EffectiveLearningRate().read(View(probe, EffectiveLearningRate.needs))
            found.append(float(values["angular"][0]) ** 2)
    assert math.sqrt(sum(found) / len(found)) == pytest.approx(math.sqrt(2 * 0.05 * 0.1), rel=0.05)


def test_what_a_scaler_has_divided_is_not_divided_again() -> None:
    """At observe the loss scale of 8 is in `.grad`, when the optimizer steps no longer."""
    built = build(BY_NAME["mlp"])
    loop = run(built, [optim.SGD(built.model.parameters(), lr=0.1)], 0)
    for p in built.model.parameters():
        p.grad.mul_(8)
    probe = Probe(built.model, as_objective(built.loss), loop.optimizers, [built.batch], loss_scale=8.0)
    probe.remember()
    for p in built.model.parameters():
        p.grad.div_(8)
    loop.optimizers[0].step()
    with probe:
        values = EffectiveLearningRate().read(View(probe, EffectiveLearningRate.needs))
    assert float(values["multiple"][0]) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize(("foreach", "refused"), [(True, True), (False, False), (None, False)])
def test_momentum_that_is_added_to_the_gradient_is_refused(foreach: bool | None, refused: bool) -> None:
    """torch adds it in place when it steps on lists of tensors; were that to change, this test would say so."""
    built = build(BY_NAME["mlp"])
    params = list(built.model.parameters())
    optimizer = optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, foreach=foreach)
    loop = run(built, [optimizer], 1)
    kept = [p.grad.clone() for p in params if p.grad is not None]
    if refused:
        with pytest.raises(Refusal, match="foreach=False"):
            read_after_step(loop, EffectiveLearningRate())
        assert not torch.equal(kept[0], params[0].grad)
    else:
        read_after_step(loop, EffectiveLearningRate())
        assert torch.equal(kept[0], params[0].grad)


@pytest.mark.parametrize("instrument", [EffectiveLearningRate(), UpdateScale()], ids=lambda i: type(i).__name__)
def test_a_group_without_a_learning_rate_is_refused(instrument: Any) -> None:
    built = build(BY_NAME["mlp"])
    optimizer = optim.SGD(built.model.parameters(), lr=0.1)
    probe = run(built, [optimizer], 0).probe()
    probe.remember()
    del optimizer.param_groups[0]["lr"]
    with probe, pytest.raises(Refusal, match="no 'lr'"):
        instrument.read(View(probe, instrument.needs))


def test_parameters_that_no_optimizer_holds_and_sparse_gradients() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(6, 2))
    optimizer = optim.SGD([model[0].weight], lr=0.2)
    batch = (torch.tensor([[0, 1], [1, 3]]), torch.tensor([0, 1]))
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    probe = Probe(model, as_objective(nn.CrossEntropyLoss()), [optimizer], [batch])
    probe.remember()
    optimizer.step()
    with probe:
        values = EffectiveLearningRate().read(View(probe, EffectiveLearningRate.needs))
    assert float(values["ratio"][0]) == pytest.approx(0.2, rel=1e-5)
    assert values["angular_per_layer"][1:].tolist() == [0, 0]
