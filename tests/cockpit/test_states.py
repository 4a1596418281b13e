"""States of training that must be read right: the whole catalogue against a plain run that is the same mathematics.

Every instrument gives the value of the plain run, or refuses for a reason that is written here. What may differ, since
it is another thing in that state, is named beside the test.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparing import ADAM, OTHER_CURVATURE, apart, net, observed, refused, same_refusals, table
from loop_cases import Case, Training, adam, rows, tokens
from torch import Tensor, nn, optim
from watching import events, readings

from cockpit_bench import Cockpit
from instruments import catalogue

LIMIT, SCALE = 0.1, 256.0


def sgd(lr: float) -> Callable[[nn.Module], Any]:
    return lambda model: [optim.SGD(model.parameters(), lr=lr)]


PLAIN = Case("plain", net, sgd(0.1))


@pytest.fixture(scope="module")
def adam_run() -> Cockpit:
    return observed(Training(ADAM))


# Accumulation: k micro-batches whose losses are divided by k are one batch.


def test_accumulated_micro_batches_read_as_one_batch() -> None:
    def whole(step: int) -> tuple[Tensor, Tensor]:
        micro = [rows(step * 3 + i) for i in range(3)]
        return torch.cat([x for x, _ in micro]), torch.cat([y for _, y in micro])

    training = Training(Case("accumulated", net, adam, accumulate=3))
    cockpit = observed(training)
    assert apart(observed(Training(Case("whole", net, adam, batch=whole))), cockpit, rel=1e-3) == {}
    same_refusals(cockpit, training)


# Loss scaling: gradients are read unscaled, whether the scaler or the user unscales them.


@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled"])
def test_a_scaled_loss_reads_as_a_plain_one(unscale: bool, adam_run: Cockpit) -> None:
    """Those that read `.grad` after the step too, when the scaler has divided it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)

    def loop(training: Training, cockpit: Cockpit, step: int) -> None:
        (optimizer,) = training.optimizers
        batch = rows(step)
        loss = training.loss(batch)
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        cockpit.observe(batch, loss)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    cockpit = observed(Training(ADAM), loop, scaler=scaler)
    assert apart(adam_run, cockpit, rel=1e-3) == {}
    assert refused(cockpit) == refused(adam_run)
    said = readings(cockpit, "gradient/norm")[0].provenance["scaled"]
    assert said == ("no" if unscale else f"unscaled from {SCALE:g}")


# Clipping by norm, for plain SGD: the step of a gradient clipped to c |g| is that of the learning rate c lr.

BY_THE_LEARNING_RATE = {
    "curvature/batch_sharpness/high_line", "curvature/batch_sharpness/low_line",
    "curvature/batch_sharpness/preconditioned",
    "curvature/preconditioned_sharpness", "curvature/sharpness/edge", "gradient/suggested_batch",
    "optimizer/update_scale", "step/clipping", "step/critical_learning_rate/best_learning_rate",
    "step/critical_learning_rate/critical_learning_rate", "step/effective_learning_rate/ratio",
    "step/learning_rate", "curvature/directional/ratio",
}  # fmt: skip
OF_THE_GRADIENT = {
    "gradient/histogram", "gradient/histogram_2d", "gradient/layer_profile/per_layer", "gradient/norm", "step/clipping",
}  # fmt: skip


def clip_before(training: Training, cockpit: Cockpit, step: int) -> None:
    batch, loss = training.backward(step)
    nn.utils.clip_grad_norm_(training.model.parameters(), LIMIT)
    cockpit.observe(batch, loss)
    training.take_step()


def clip_after(training: Training, cockpit: Cockpit, step: int) -> None:
    batch, loss = training.backward(step)
    cockpit.observe(batch, loss)
    nn.utils.clip_grad_norm_(training.model.parameters(), LIMIT)
    training.take_step()


@pytest.fixture(scope="module")
def gradient_norm() -> float:
    training = Training(PLAIN)
    training.backward(0)
    return float(torch.cat([p.grad.flatten() for p in training.model.parameters()]).norm())  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def clipped_after() -> Cockpit:
    return observed(Training(PLAIN), clip_after, steps=1)


def test_clipping_after_observe_is_a_smaller_learning_rate(gradient_norm: float, clipped_after: Cockpit) -> None:
    """The gradient is read as it was, the step as it was taken; c is known to the clipping instrument alone."""
    factor = LIMIT / gradient_norm
    assert factor < 0.5
    short = observed(Training(Case("short", net, sgd(0.1 * factor))), steps=1)
    assert apart(short, clipped_after, rel=1e-3, but=BY_THE_LEARNING_RATE) == {}
    found = table(clipped_after)
    assert found["gradient/norm/norm"][0] == pytest.approx([gradient_norm], rel=1e-4)
    assert found["step/clipping/factor"][0] == pytest.approx([factor], rel=1e-3)
    assert found["step/clipping/before"][0] == pytest.approx([gradient_norm], rel=1e-4)
    assert found["step/clipping/after"][0] == pytest.approx([LIMIT], rel=1e-3)
    assert found["step/update_ratio/update_ratio"][0] > 0
    same_refusals(clipped_after, Training(PLAIN))


def test_clipping_before_observe_shows_in_the_gradient_alone(clipped_after: Cockpit) -> None:
    """`.grad` is what is used: its norm is the limit. What is recomputed is the gradient of the loss, not clipped."""
    cockpit = observed(Training(PLAIN), clip_before, steps=1)
    assert apart(clipped_after, cockpit, rel=1e-3, but=OF_THE_GRADIENT) == {}
    found = table(cockpit)
    assert found["gradient/norm/norm"][0] == pytest.approx([LIMIT], rel=1e-3)
    assert found["step/clipping/clipped"][0] == pytest.approx([0.0]), "nobody clipped what was observed"
    assert "clipped before observe" in events(cockpit, "gradient_note")[0].detail["reason"]
    same_refusals(cockpit, Training(PLAIN))


# Layers that are frozen before the others are a fixed transformation of the inputs.

OF_THE_INPUTS = {"batch/input_moments", "network/activation_scale", "network/dead_units", "batch/repeated"}


def front() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layer = nn.Linear(6, 6)
    return nn.Sequential(layer.requires_grad_(False), nn.Tanh())


def test_frozen_layers_are_part_of_the_data() -> None:
    def features(step: int) -> tuple[Tensor, Tensor]:
        return front()(rows(step)[0]).detach(), rows(step)[1]

    training = Training(Case("frozen", lambda: nn.Sequential(front(), net()), adam))
    cockpit = observed(training)
    alone = observed(Training(Case("alone", net, adam, batch=features)))
    assert apart(alone, cockpit, rel=1e-3, but=OF_THE_INPUTS) == {}
    same_refusals(cockpit, training)


# Layers that nobody calls count where something is relative to all parameters, and by their number.

RELATIVE_TO_ALL = {
    "gradient/early_stopping/silent", "gradient/layer_profile/first_over_last", "gradient/layer_profile/silent",
    "gradient/signal_to_noise/silent", "network/weight_norm/weight_norm", "optimizer/update_scale/rms",
    "step/distance/relative", "step/effective_learning_rate/angular", "step/update_ratio/update_ratio",
}  # fmt: skip


class PartlyCalled(nn.Module):
    def __init__(self, *, unused: bool) -> None:
        super().__init__()
        self.net = net()
        if unused:
            self.unused = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


def test_unused_parameters_change_no_other_reading() -> None:
    training = Training(Case("unused", lambda: PartlyCalled(unused=True), adam))
    cockpit = observed(training)
    used = observed(Training(Case("used", lambda: PartlyCalled(unused=False), adam)))
    several = {
        f"{name}/{output}"
        for name in catalogue.builtin_names()
        for output, declared in catalogue.make(name).outputs.items()
        if declared.kind == "per-layer"
    }
    assert apart(used, cockpit, rel=0.01, but=RELATIVE_TO_ALL | several | OTHER_CURVATURE) == {}
    left, right = table(used), table(cockpit)
    for name in sorted(several & left.keys()):
        if name.rpartition("/")[0] in OTHER_CURVATURE:
            continue
        a, b = left[name][0].reshape(2, 4), right[name][0].reshape(2, 6)[:, :4]
        torch.testing.assert_close(torch.tensor(b), torch.tensor(a), rtol=1e-3, atol=1e-6, equal_nan=True, msg=name)
    same_refusals(cockpit, training)


# Several optimizers are one with several groups.


def test_two_optimizers_read_as_two_groups() -> None:
    def groups(model: nn.Module) -> list[optim.Optimizer]:
        first, last = list(model.parameters())[:2], list(model.parameters())[2:]
        return [optim.SGD([{"params": first}, {"params": last, "lr": 0.05}], lr=0.1, momentum=0.9)]

    def optimizers(model: nn.Module) -> list[optim.Optimizer]:
        first, last = list(model.parameters())[:2], list(model.parameters())[2:]
        return [optim.SGD(first, lr=0.1, momentum=0.9), optim.SGD(last, lr=0.05, momentum=0.9)]

    training = Training(Case("two optimizers", net, optimizers))
    cockpit = observed(training)
    assert apart(observed(Training(Case("two groups", net, groups))), cockpit, rel=1e-6) == {}
    same_refusals(cockpit, training)


# Sparse gradients are zero where they say nothing.


def words(step: int) -> tuple[Tensor, Tensor]:
    text_NT, _ = tokens(step)
    return text_NT, text_NT[:, 0] % 3


def test_sparse_gradients_read_as_dense_ones() -> None:
    def model(sparse: bool) -> nn.Module:
        return nn.Sequential(nn.Embedding(9, 4, sparse=sparse), nn.Flatten(), nn.ReLU(), nn.Linear(20, 3))

    training = Training(Case("sparse", lambda: model(True), sgd(0.1), batch=words))
    cockpit = observed(training)
    dense = observed(Training(Case("dense", lambda: model(False), sgd(0.1), batch=words)))
    assert apart(dense, cockpit, rel=1e-4) == {}
    same_refusals(cockpit, training)
