"""Losses that differentiate what the model gives by its input: gradient penalties, physics-informed losses, forces."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Built
from taking import take
from torch import Tensor, nn, optim
from twins import example_gradients, trainable

from instruments import Probe, Refusal, View, catalogue
from instruments.batch.example_loss import ExampleLoss
from instruments.curvature.tic import Tic
from instruments.curvature.trace import CurvatureTrace
from instruments.gradient.example_histogram import ExampleHistogram
from instruments.held import HeldBatches
from instruments.meter import Meter
from instruments.network.activation_scale import ActivationScale
from instruments.objective import as_objective
from instruments.step.alpha import Alpha
from instruments.step.critical_learning_rate import CriticalLearningRate
from instruments.step.step_ratio import StepRatio

N = 6
LAYERS = [
    "activation_scale", "attention_logits", "dead_units", "effective_rank", "normalisation_statistics", "output_scale",
]  # fmt: skip


class Field(nn.Module):
    """A number for three points in the plane: attention by hand, a norm, an activation."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.norm = nn.Linear(2, 6), nn.BatchNorm1d(6)
        self.head = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head(self.norm(((q @ k.mT).softmax(-1) @ v).flatten(1)))


def slope_of(u: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(u.sum(), x, create_graph=True)[0]


def physics(call: Any, batch: Any) -> Tensor:
    """The square of u'' + u."""
    x = batch[0].clone().requires_grad_()
    u = call(x)
    return (slope_of(slope_of(u, x), x).flatten(1).sum(1) + u[:, 0]).square()


def penalised(call: Any, batch: Any) -> Tensor:
    """A critic's loss with a gradient penalty (Gulrajani et al. 2017, algorithm 1)."""
    real, fake, share = batch
    mix = (share * real + (1 - share) * fake).requires_grad_()
    penalty = (slope_of(call(mix), mix).flatten(1).norm(dim=1) - 1).square()
    return (call(fake) - call(real))[:, 0] + 10 * penalty


def build(loss: Callable[..., Tensor], dropout: float = 0.0) -> Built:
    """In float64, norms by their running statistics."""
    torch.manual_seed(0)
    model = Field(dropout).double().eval()
    batch = tuple(torch.randn(N, 3, 2).double() for _ in range(2))
    return Built(model, loss, (*batch, torch.rand(N, 1, 1).double()))


@pytest.mark.parametrize("loss", [physics, penalised])
def test_both_ends_of_a_step_are_those_of_plain_sums(loss: Callable[..., Tensor]) -> None:
    built = build(loss)
    params = list(trainable(built.model).values())
    step = [1e-2 * torch.randn_like(p) for p in params]
    before_N, g_ND = loss(built.model, built.batch).detach(), example_gradients(built.model, loss, built.batch)
    along_N = g_ND @ torch.cat([u.flatten() for u in step])
    needs = StepRatio.needs | Alpha.needs | CriticalLearningRate.needs
    probe = Probe(built.model, as_objective(loss), [], [built.batch])
    probe.remember()
    with torch.no_grad():
        torch._foreach_add_(params, step, alpha=0.5)
    half = float(loss(built.model, built.batch).mean().detach())
    with torch.no_grad():
        torch._foreach_add_(params, step, alpha=0.5)
    after_N = loss(built.model, built.batch).detach()
    with probe:
        view = View(probe, needs)
        effect, examples = view.effect, view.step_examples
        assert float(view.loss_at(0.5)) == pytest.approx(half, rel=1e-12)
    found = (effect.loss_before, effect.loss_after, effect.slope)
    assert found == pytest.approx([float(t.mean()) for t in (before_N, after_N, along_N)], rel=1e-10)
    for values_N, expected_N in (
        (examples.before_N, before_N), (examples.after_N, after_N), (examples.slope_N, along_N)
    ):  # fmt: skip
        assert torch.allclose(values_N, expected_N, rtol=1e-10)


@pytest.mark.parametrize("loss", [physics, penalised])
def test_losses_and_gradients_of_examples(loss: Callable[..., Tensor]) -> None:
    built = build(loss)
    with Probe(built.model, as_objective(loss), [], [built.batch]) as probe:
        losses_N = View(probe, ExampleLoss.needs).losses_N
        rows = View(probe, ExampleHistogram.needs).example_gradients(N, lambda g: torch.cat([t.flatten() for t in g]))
    assert torch.allclose(losses_N, loss(built.model, built.batch), rtol=1e-12)
    assert torch.allclose(torch.stack(rows), example_gradients(built.model, loss, built.batch), atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_those_of_a_loss_that_only_calls(name: str) -> None:
    built = build(physics)
    instrument = catalogue.make(f"network/{name}")
    found, _, _ = take(instrument, built)
    expected, _, _ = take(instrument, Built(built.model, lambda call, batch: call(batch[0])[:, 0], built.batch))
    for key, value in expected.items():
        one, other = (torch.as_tensor(getattr(v, "value", v)).double() for v in (found[key], value))
        assert torch.allclose(one, other, rtol=1e-12, equal_nan=True), key
        assert not one.requires_grad


def test_the_line_along_a_step_is_searched() -> None:
    built = build(penalised)
    optimizer = optim.SGD(built.model.parameters(), lr=1e-3)
    penalised(built.model, built.batch).mean().backward()
    values, _, _ = take(CriticalLearningRate(), built, [optimizer], move=optimizer.step)
    assert values["rises_at_once"] == 0


def test_the_failing_forward_is_not_repeated() -> None:
    """And a loss that can do without a graph never has one."""
    graphs: list[bool] = []

    def counted(call: Any, batch: Any) -> Tensor:
        graphs.append(torch.is_grad_enabled())
        return physics(call, batch)

    def plain(call: Any, batch: Any) -> Tensor:
        graphs.append(torch.is_grad_enabled())
        return call(batch[0])[:, 0]

    for loss, expected in ((counted, [False, True, True, True]), (plain, [False, False, False])):
        built, plans = build(loss), dict[Any, Any]()
        for _ in range(2):
            with Probe(built.model, as_objective(loss), [], [built.batch], plans=plans) as probe:
                assert not probe.example_losses(Meter()).requires_grad
        with Probe(built.model, as_objective(loss), [], [built.batch], plans=plans) as probe:
            ActivationScale().read(View(probe, ActivationScale.needs))
        assert graphs == expected
        graphs.clear()


def test_the_forward_that_is_repeated_draws_the_same() -> None:
    """And what the layers gave to the forward that failed is not counted."""
    built = build(physics, dropout=0.5)
    built.model.train()

    def read(of_probe: Callable[[Probe], Any], plans: dict[Any, Any]) -> Tensor:
        with Probe(built.model, as_objective(physics), [], [built.batch], plans=plans) as probe:
            return torch.as_tensor(of_probe(probe))

    for of_probe in (
        lambda probe: probe.example_losses(Meter()),
        lambda probe: ActivationScale().read(View(probe, ActivationScale.needs))["rms"],
        lambda probe: probe.activations(Meter())["norm"][0],
    ):
        plans: dict[Any, Any] = {}
        assert torch.equal(read(of_probe, plans), read(of_probe, plans))


@pytest.mark.parametrize("loss", [physics, penalised])
@pytest.mark.parametrize("instrument", [CurvatureTrace(), Tic()], ids=["trace", "tic"])
def test_there_is_no_gauss_newton_matrix_and_the_hessian_is_read(loss: Callable[..., Tensor], instrument: Any) -> None:
    built = build(loss)
    with pytest.raises(Refusal, match=r'by its input .* read the Hessian, matrix="hessian"'):
        take(instrument, built)
    values, _, _ = take(type(instrument)(matrix="hessian"), built)
    assert values


def penalised_by_zeros(call: Any, batch: Any) -> Tensor:
    """The same penalty, where what does not depend on the input has the gradient zero."""
    x = batch[0].clone().requires_grad_()
    slope = torch.autograd.grad(call(x).sum(), x, create_graph=True, materialize_grads=True)[0]
    return call(batch[1])[:, 0].square() + slope.flatten(1).square().sum(1)


def asked_for_nothing(call: Any, batch: Any) -> Tensor:
    """Inputs that ask for gradients which nobody takes, as adversarial training leaves them."""
    return call(batch[0].clone().requires_grad_())[:, 0].square()


@pytest.mark.parametrize("keep_graphs", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("loss", "refused"), [(penalised_by_zeros, True), (asked_for_nothing, False)])
def test_a_penalty_that_the_cut_would_make_zero_is_noticed(
    loss: Callable[..., Tensor], refused: bool, dropout: float, keep_graphs: bool
) -> None:
    built, instrument = build(loss, dropout), CurvatureTrace(probes=4)
    built.model.train(dropout > 0)
    held = HeldBatches([built.batch])
    held.keep_graphs = keep_graphs
    with Probe(built.model, as_objective(loss), [], [built.batch], held=held) as probe:
        view = View(probe, instrument.needs)
        if refused:
            with pytest.raises(Refusal, match=r'by its input .* read the Hessian, matrix="hessian"'):
                instrument.advance(view, instrument.init())
        else:
            assert instrument.advance(view, instrument.init())


class Forces(nn.Module):
    """Minus the slope of an energy: the model itself needs a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return -slope_of(self.energy(x), x)


def test_targets_are_drawn_for_a_model_that_differentiates() -> None:
    torch.manual_seed(0)
    built = Built(Forces().double(), nn.MSELoss(), (torch.randn(N, 3).double(), torch.randn(N, 3).double()))
    drawn, _, _ = take(CurvatureTrace(engine="drawn", draws=64), built)
    signs, _, _ = take(CurvatureTrace(probes=64), built)
    error = float(drawn["trace"].stderr) + float(signs["trace"].stderr)
    assert abs(float(drawn["trace"].value) - float(signs["trace"].value)) < 4 * error
