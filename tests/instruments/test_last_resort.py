"""Where something has no second derivative: differences of the gradient, and the reading says so."""

import pytest
import torch
from torch import Tensor, nn
from twins import dense_hessian

from instruments import Probe, View
from instruments.curvature.sharpness import Sharpness
from instruments.held import HeldBatches
from instruments.objective import as_objective
from instruments.operators.resort import LastResortHessian
from instruments.refusal import Refusal


class _OnceDifferentiable(torch.autograd.Function):
    """tanh whose backward cannot be differentiated, as that of a fused kernel."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


class Fused(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.a, self.b, self.fused = nn.Linear(4, 5), nn.Linear(5, 3), fused

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(_OnceDifferentiable.apply(h) if self.fused else torch.tanh(h))


def sharpness(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[dict[str, float], dict[str, object]]:
    instrument = Sharpness(tol=1e-3)
    with Probe(model, as_objective(nn.CrossEntropyLoss()), [], [batch], held=HeldBatches([batch])) as probe:
        view = View(probe, instrument.needs)
        values, _ = instrument.advance(view, instrument.init())
    return {name: float(v) for name, v in values.items()}, view.meter.provenance  # type: ignore[arg-type]


def test_the_reading_is_right_and_names_its_route_and_error() -> None:
    torch.manual_seed(0)
    plain = Fused(fused=False).double()
    fused = Fused(fused=True).double()
    fused.load_state_dict(plain.state_dict())
    batch = (torch.randn(12, 4, dtype=torch.float64), torch.randint(0, 3, (12,)))
    before = [p.detach().clone() for p in fused.parameters()]
    values, provenance = sharpness(fused, batch)
    top = float(torch.linalg.eigvalsh(dense_hessian(plain, nn.CrossEntropyLoss(), batch))[-1])
    assert values["sharpness"] == pytest.approx(top, rel=1e-3)
    assert "last resort" in str(provenance["route"])
    assert "double backward failed" in str(provenance["route"])
    assert 0 < float(provenance["product_error"]) < 1e-3  # type: ignore[arg-type]
    assert all(torch.equal(p, old) for p, old in zip(fused.parameters(), before, strict=True))


def test_what_was_found_once_holds_for_every_later_reading() -> None:
    torch.manual_seed(0)
    plain, fused = Fused(fused=False).double(), Fused(fused=True).double()
    fused.load_state_dict(plain.state_dict())
    batch = (torch.randn(12, 4, dtype=torch.float64), torch.randint(0, 3, (12,)))
    top = float(torch.linalg.eigvalsh(dense_hessian(plain, nn.CrossEntropyLoss(), batch))[-1])
    instrument, plans = Sharpness(tol=1e-3), {}
    state = instrument.init()
    for step in range(3):
        held = HeldBatches([batch])
        objective = as_objective(nn.CrossEntropyLoss())
        with Probe(fused, objective, [], [batch], step=step, held=held, plans=plans) as probe:
            view = View(probe, instrument.needs)
            values, state = instrument.advance(view, state)
            step_route = View(probe, frozenset({"step_hessian"})).step_hessian.route
        assert float(values["sharpness"]) == pytest.approx(top, rel=1e-3)  # type: ignore[arg-type]
        assert "not symmetric" in view.meter.provenance["route"]
        assert "last resort" in step_route


def test_double_backward_stays_the_route_where_it_works() -> None:
    torch.manual_seed(0)
    batch = (torch.randn(12, 4), torch.randint(0, 3, (12,)))
    _, provenance = sharpness(Fused(fused=False), batch)
    assert provenance["route"] == "double backward, graph kept"
    assert "product_error" not in provenance


def test_out_of_memory_is_not_taken_for_a_missing_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(self: object, v_D: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("planted")

    torch.manual_seed(0)
    model = Fused(fused=False)
    batch = (torch.randn(12, 4), torch.randint(0, 3, (12,)))
    with Probe(model, as_objective(nn.CrossEntropyLoss()), [], [batch], held=HeldBatches([batch])) as probe:
        operator = View(probe, frozenset({"hessian"})).hessian
        monkeypatch.setattr("instruments.operators.hessian.HessianOperator.matvec", short)
        with pytest.raises(torch.OutOfMemoryError):
            operator.matvec(torch.ones(operator.size))


def test_a_refusal_inside_passes_through() -> None:
    def piece() -> tuple[Tensor, float]:
        raise Refusal("planted")

    from instruments.layout import Layout
    from instruments.operators.hessian import nullcontext

    with pytest.raises(Refusal, match="planted"):
        LastResortHessian([piece], Layout.of(nn.Linear(2, 2)), keep_graphs=True, context=lambda forward: nullcontext())
