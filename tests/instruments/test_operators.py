"""The Hessian operator against central differences of the gradient, on every case of the table."""

from typing import Any

import pytest
import torch
from cases import BY_NAME, CASES, Case, build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from twins import dense_hessian, flat_loss

from instruments import Probe
from instruments.held import HeldBatches
from instruments.layout import Layout
from instruments.meter import Meter
from instruments.objective import as_objective
from instruments.operators.hessian import HessianOperator
from instruments.operators.operator import DenseOperator, Operator
from instruments.operators.preconditioned import PreconditionedOperator

SMOOTH = [case for case in CASES if not case.random and case.name not in ("in_place_relu",)]


def make_probe(case: Case, batches: list[Any] | None = None, seed: int = 0) -> tuple[Probe, Any]:
    built = build(case, seed)
    held = HeldBatches(batches or [built.batch])
    probe = Probe(built.model, as_objective(built.loss), [], [built.batch], held=held)
    return probe, built


def dense(operator: Operator) -> torch.Tensor:
    return torch.stack([operator.matvec(e) for e in torch.eye(operator.size, dtype=operator.dtype)], 1)


@pytest.mark.parametrize("case", SMOOTH, ids=lambda case: case.name)
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "rebuilt"])
def test_hessian_equals_differences_of_the_gradient(case: Case, kept: bool) -> None:
    probe, built = make_probe(case)
    probe.held.keep_graphs = kept
    expected = dense_hessian(built.model, built.loss, built.batch)
    with probe:
        measured = dense(probe.curvatures.hessian(Meter()))
    assert torch.allclose(measured, expected, atol=1e-7 * (1 + float(expected.abs().max())))
    assert float(measured.abs().max()) > 1e-3 or case.name == "all_linear"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_products_repeat_bit_for_bit_and_are_symmetric(case: Case) -> None:
    probe, _ = make_probe(case)
    with probe:
        for kept in (True, False):
            probe.held.keep_graphs, probe._hessian = kept, None
            operator = probe.curvatures.hessian(Meter())
            u, v = torch.randn(2, operator.size, dtype=torch.float64)
            hu = operator.matvec(u)
            assert torch.equal(hu, operator.matvec(u))
            assert torch.dot(v, hu) == pytest.approx(float(torch.dot(u, operator.matvec(v))), abs=1e-10)


def test_free_gradient_is_the_gradient() -> None:
    probe, built = make_probe(BY_NAME["tied_attention"])
    f, theta_D = flat_loss(built.model, built.loss, built.batch)
    theta_D.requires_grad_()
    expected = torch.autograd.grad(f(theta_D), theta_D)[0]
    with probe:
        assert torch.allclose(probe.curvatures.hessian(Meter()).gradient_D, expected, atol=1e-12)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]))])
@pytest.mark.parametrize("kept", [True, False])
def test_unequal_batches_are_one_loss(loss: nn.Module, kept: bool) -> None:
    """Batches of 4 and 2 give the Hessian of the 6 together, class weights included."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 0, 1])
    loss = loss.double()
    whole = dense_hessian(model, loss, (x, y))
    held = HeldBatches([(x[:4], y[:4]), (x[4:], y[4:])])
    held.keep_graphs = kept
    with Probe(model, as_objective(loss), [], [(x, y)], held=held) as probe:
        assert torch.allclose(dense(probe.curvatures.hessian(Meter())), whole, atol=1e-7)


def test_tokens_that_count_weigh_the_batches() -> None:
    """A batch with ignored targets counts for its tokens, not for its rows."""
    built = build(BY_NAME["tied_attention"])
    tokens, targets = built.batch
    targets[4:, :3] = -100
    held = HeldBatches([(tokens[:3], targets[:3]), (tokens[3:], targets[3:])])
    expected = dense_hessian(built.model, built.loss, built.batch)
    with Probe(built.model, as_objective(built.loss), [], [built.batch], held=held) as probe:
        assert torch.allclose(dense(probe.curvatures.hessian(Meter())), expected, atol=1e-7)


def test_all_linear_loss_has_zero_hessian() -> None:
    model = nn.Linear(3, 1).double()
    x = torch.randn(5, 3, dtype=torch.float64)

    def losses(call: Any, batch: Any) -> torch.Tensor:
        return call(batch).squeeze(1)

    with Probe(model, as_objective(losses), [], [x], held=HeldBatches([x])) as probe:
        operator = probe.curvatures.hessian(Meter())
        assert torch.equal(operator.matvec(torch.ones(4, dtype=torch.float64)), torch.zeros(4, dtype=torch.float64))


def test_sparse_embedding_gradients_are_made_dense() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Tanh(), nn.Linear(6, 3)).double()
    batch = (torch.randint(0, 5, (6, 2)), torch.randint(0, 3, (6,)))
    with Probe(model, as_objective(nn.CrossEntropyLoss()), [], [batch], held=HeldBatches([batch])) as probe:
        measured = dense(probe.curvatures.hessian(Meter()))
    model[0].sparse = False
    assert torch.allclose(measured, dense_hessian(model, nn.CrossEntropyLoss(), batch), atol=1e-7)


def test_fused_attention_alone_has_no_second_derivative_but_the_probe_has() -> None:
    """The reason for the math kernel: without it a double backward through attention fails on this machine."""
    case = BY_NAME["tied_attention"]
    probe, built = make_probe(case)
    layout = Layout.of(built.model)

    def piece() -> tuple[torch.Tensor, float]:
        return as_objective(built.loss).parts(built.model, built.batch).loss, 1.0

    with pytest.raises(RuntimeError):
        HessianOperator([piece], layout).matvec(torch.ones(layout.size, dtype=torch.float64))
    with probe:
        probe.curvatures.hessian(Meter()).matvec(torch.ones(layout.size, dtype=torch.float64))


def test_eval_mode_reads_another_loss() -> None:
    from instruments import ProbeSettings

    built = build(BY_NAME["batch_norm_train"])
    batch = built.batch
    objective = as_objective(built.loss)
    readings = {}
    for mode in ("train", "eval"):
        held = HeldBatches([batch])
        with Probe(built.model, objective, [], [batch], held=held, settings=ProbeSettings(mode=mode)) as probe:
            readings[mode] = dense(probe.curvatures.hessian(Meter()))
        assert built.model.training
    expected = dense_hessian(built.model.eval(), built.loss, batch)
    assert torch.allclose(readings["eval"], expected, atol=1e-7)
    assert not torch.allclose(readings["train"], expected, atol=1e-3)


def test_out_of_memory_rebuilds_then_drops_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    probe, _ = make_probe(BY_NAME["mlp"], batches=[build(BY_NAME["mlp"], s).batch for s in range(4)])
    tries: list[tuple[bool, int]] = []

    class Greedy(HessianOperator):
        def __init__(self, pieces: Any, layout: Layout, *, keep_graphs: bool = True, **rest: Any) -> None:
            tries.append((keep_graphs, len(pieces)))
            if keep_graphs or len(pieces) > 2:
                raise torch.OutOfMemoryError("planted")
            super().__init__(pieces, layout, keep_graphs=keep_graphs, **rest)

    monkeypatch.setattr("instruments.operators.resort.HessianOperator", Greedy)
    with probe:
        operator = probe.curvatures.hessian(Meter())
        assert torch.isfinite(operator.matvec(torch.ones(operator.size, dtype=torch.float64))).all()
    assert tries == [(True, 4), (False, 4), (False, 2)]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 8))
def test_preconditioned_operator_has_the_eigenvalues_of_d_times_h_plus_c(seed: int, size: int) -> None:
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(size, size, generator=g, dtype=torch.float64)
    h = a + a.T
    d, c = torch.rand(2, size, generator=g, dtype=torch.float64)
    symmetric = dense(PreconditionedOperator(DenseOperator(h), d, c))
    expected = torch.linalg.eigvals(torch.diag(d) @ (h + torch.diag(c))).real.sort().values
    assert torch.allclose(torch.linalg.eigvalsh(symmetric), expected, atol=1e-8)
