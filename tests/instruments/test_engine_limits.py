"""Where gradients are easily read wrong without notice: read right, or refused with the remedy.

Shapes: N = examples, D = trainable scalars.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gauss_newton_twin import matrix_of
from test_samples import EVERYTHING, assert_moments, measure
from torch import Tensor, nn
from twins import dense_hessian, example_gradients
from zoo import Checkpointed, CustomFunction, N

from instruments import Probe, ProbeSettings, Refusal
from instruments.meter import Meter
from instruments.objective import as_objective
from instruments.operators.operator import Operator

CROSS_ENTROPY = nn.CrossEntropyLoss()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def rows(features: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(N, features, dtype=torch.float64), torch.randint(0, 3, (N,))


def probe_of(model: nn.Module, batch: Any, **settings: Any) -> Probe:
    return Probe(model, as_objective(CROSS_ENTROPY), [], [batch], settings=ProbeSettings(**settings))


@pytest.mark.parametrize("engine", ["auto", "fused", "torch.func", "loop"])
def test_a_contrastive_loss_is_refused_under_dropout_too(engine: str) -> None:
    """Two views of each example by two masks, against the other examples' views (SimCSE)."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 6)).double()

    def contrastive(call: Any, batch: Any) -> Tensor:
        one, other = (F.normalize(call(batch[0])) for _ in range(2))
        return F.cross_entropy(one @ other.T / 0.1, torch.arange(len(one)), reduction="none")

    with pytest.raises(Refusal, match="interact"):
        measure(model, contrastive, [rows()], engine)
    assert all(module.training for module in model.modules())


def test_a_contrastive_loss_with_masks_that_cannot_be_turned_off_is_refused() -> None:
    class Always(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.layer(x), 0.1)

    def contrastive(call: Any, batch: Any) -> Tensor:
        one, other = (F.normalize(call(batch[0])) for _ in range(2))
        return F.cross_entropy(one @ other.T / 0.1, torch.arange(len(one)), reduction="none")

    with pytest.raises(Refusal, match="drawn in eval mode too"):
        measure(Always().double(), contrastive, [rows()], "auto")


def test_what_a_hook_on_a_parameter_does_is_in_every_gradient() -> None:
    model, batch = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double(), rows()
    grads_ND = example_gradients(model, CROSS_ENTROPY, batch)
    mask = (torch.rand(8, 4) > 0.7).double()
    grads_ND[:, :32] *= mask.reshape(-1)
    model[0].weight.register_hook(lambda grad: grad * mask)
    assert_moments(measure(model, CROSS_ENTROPY, [batch], "auto", EVERYTHING), grads_ND)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_squares_of_half_precision_are_summed_in_single(kind: str, dtype: torch.dtype) -> None:
    """Gradients of 1e-4 have squares below the smallest number of float16."""
    if kind == "linear":
        model, x = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3)), torch.randn(64, 20)
    else:
        model, x = nn.Sequential(nn.Conv1d(3, 8, 3), nn.Flatten(), nn.Linear(64, 3)), torch.randn(64, 3, 10)
    model, batch = model.to(dtype), (x.to(dtype), torch.randint(0, 3, (64,)))

    def small(call: Any, pair: Any) -> Tensor:
        return 1e-3 * F.cross_entropy(call(pair[0]).float(), pair[1], reduction="none")

    moments = measure(model, small, [batch], "fused", EVERYTHING)
    squares_ND = example_gradients(model, small, batch).double().square()
    assert moments.second_D is not None
    for found, expected in ((moments.norms_sq_N, squares_ND.sum(1)), (moments.second_D, squares_ND.mean(0))):
        assert (found - expected).norm() <= 1.5e-3 * expected.norm()


@pytest.mark.parametrize("engine", ["auto", "fused", "loop"])
def test_moments_inside_a_reentrant_checkpoint_are_refused(engine: str) -> None:
    with pytest.raises(Refusal, match="use_reentrant=False"):
        measure(Checkpointed(reentrant=True).double(), CROSS_ENTROPY, [rows()], engine)


def test_derivatives_inside_a_reentrant_checkpoint_are_refused() -> None:
    with probe_of(Checkpointed(reentrant=True).double(), rows()) as probe:
        with pytest.raises(Refusal, match="use_reentrant=False"):
            probe.loss_and_gradient()
        with pytest.raises(Refusal, match="use_reentrant=False"):
            probe.curvatures.hessian(Meter())


def test_a_checkpoint_that_is_not_reentrant_is_read_right() -> None:
    model, batch = Checkpointed(reentrant=False).double(), rows()
    plain = nn.Sequential(model.inner, nn.Tanh(), model.out)  # type: ignore[arg-type]
    with probe_of(model, batch) as probe:
        _, gradient_D, _ = probe.loss_and_gradient()
        hessian_DD = matrix_of(probe.curvatures.hessian(Meter()))
    assert torch.allclose(gradient_D, example_gradients(plain, CROSS_ENTROPY, batch).mean(0), atol=1e-12)
    assert torch.allclose(hessian_DD, dense_hessian(plain, CROSS_ENTROPY, batch), atol=1e-8)


class WritesOver(nn.Module):
    """An activation in place, and a residual connection by +=."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.second = nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.first(x))
        out = self.second(h)
        out += h
        return self.head(out)


def test_activations_are_those_that_the_layer_gave() -> None:
    model, batch = WritesOver().double(), rows()
    with probe_of(model, batch) as probe:
        seen = probe.activations(Meter())
    first = model.first(batch[0])
    assert torch.equal(seen["first"][0], first)
    assert torch.equal(seen["second"][0], model.second(first.clamp(min=0)))


class _ConstantDerivative(torch.autograd.Function):
    """x sigmoid(x), whose derivative is kept as plain numbers: differentiated again, it is a constant."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        s = torch.sigmoid(x)
        ctx.slope = s + x * s * (1 - s)
        return x * s

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return g * ctx.slope


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _ConstantDerivative.apply(x)


def hessian_of(model: nn.Module, batch: Any) -> tuple[Tensor, str]:
    with probe_of(model, batch) as probe:
        operator: Operator = probe.curvatures.hessian(Meter())
        return matrix_of(operator), operator.route


def test_a_derivative_that_is_a_constant_goes_to_the_last_resort() -> None:
    """The Hessian without its share is symmetric: only a comparison with differences tells."""
    first, last, batch = nn.Linear(4, 5).double(), nn.Linear(5, 3).double(), rows()
    hessian_DD, route = hessian_of(nn.Sequential(first, Swish(), last), batch)
    true_DD = dense_hessian(nn.Sequential(first, nn.SiLU(), last), CROSS_ENTROPY, batch)
    assert "last resort" in route
    assert (hessian_DD - true_DD).norm() < 1e-5 * true_DD.norm()


def test_a_custom_function_that_can_be_differentiated_twice_stays_with_double_backward() -> None:
    model, batch = CustomFunction().double(), rows()
    hessian_DD, route = hessian_of(model, batch)
    assert route == "double backward, graph kept"
    assert torch.allclose(hessian_DD, dense_hessian(model, CROSS_ENTROPY, batch), atol=1e-8)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(3, 4), nn.Linear(4, 3)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(tokens)))


@pytest.mark.parametrize(("pattern", "columns"), [("head.*", slice(0, 15)), ("head.weight", slice(0, 12))])
def test_a_tied_weight_is_chosen_by_any_of_its_names(pattern: str, columns: slice) -> None:
    model, batch = Tied().double(), (torch.randint(0, 3, (N,)), torch.randint(0, 3, (N,)))
    with probe_of(model, batch, parameters=pattern) as probe:
        moments = probe.samples.moments(Meter(), EVERYTHING)
    assert_moments(moments, example_gradients(model, CROSS_ENTROPY, batch)[:, columns])
