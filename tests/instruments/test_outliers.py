"""The top of the spectrum, its gap and the gradient in it, against dense eigenvectors."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import Built
from taking import case, take
from torch import nn
from twins import dense_hessian, total_loss, trainable

from instruments import Probe, View
from instruments.curvature._top import top_eigenpairs
from instruments.curvature.outliers import EIGENVALUES, Outliers, concentration, largest_gap
from instruments.objective import as_objective
from instruments.operators.operator import DenseOperator

NAMES = ["mlp", "mlp_weighted", "cnn_plain", "tied_attention", "recurrent", "called_twice_unused", "frozen"]


def gradient(built: Built) -> torch.Tensor:
    params = list(trainable(built.model).values())
    loss = total_loss(built.model, built.loss, built.batch)
    grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
    return torch.cat([g.reshape(-1) for g in grads])


@pytest.mark.parametrize("name", NAMES)
def test_eigenvalues_and_concentration_are_the_dense_ones(name: str) -> None:
    built = case(name)
    values_D, vectors_DD = torch.linalg.eigh(dense_hessian(built.model, built.loss, built.batch))
    top, g_D = values_D.flip(0), gradient(built)
    state = None
    for step in range(3):
        values, state, _ = take(Outliers(tol=1e-9, max_products=80), built, state=state, step=step)
        found = [values[f"eigenvalue_{i}"] for i in range(1, 6)]
        assert found == pytest.approx(top[:5].tolist(), abs=1e-3 * float(top[0]))
        assert values["next"] == pytest.approx(float(top[5]), abs=1e-3 * float(top[0]))
        assert all(np.isnan(values[f"eigenvalue_{i}"]) for i in range(6, 11))
        assert values["converged"] == 1.0
        if top[5] > 0.01 * top[0]:
            assert values["outlier_ratio"] == pytest.approx(float(top[0] / top[5]), rel=1e-2)
        if top[4] - top[5] > 0.02 * top[0]:
            v_kD = vectors_DD.T.flip(0)[:5]
            share = float((v_kD @ g_D).square().sum() / g_D.square().sum())
            assert float(values["concentration"]) == pytest.approx(share, abs=1e-2)
    assert list(state) == ["kept_D"]


def test_few_are_missed_along_a_training_run() -> None:
    """At the default tolerance, from what was kept ten steps before; at about two products an eigenvalue."""
    missed, state, products = 0, None, []
    for step, (built, hessian_DD) in enumerate(training(30)):
        truth = torch.linalg.eigvalsh(hessian_DD).flip(0)[:6].numpy()
        with Probe(built.model, as_objective(built.loss), [], [built.batch], step=step) as probe:
            view = View(probe, Outliers.needs)
            values, state = Outliers().advance(view, state or Outliers().init())
        found = np.array([*(values[f"eigenvalue_{i}"] for i in range(1, 6)), values["next"]])
        assert (found <= truth + 1e-9).all()
        missed += bool((truth - found > 0.03 * truth[0]).any())
        products.append(view.meter.products)
    assert missed <= 3
    assert np.mean(products[1:]) < 15


def training(readings: int) -> Iterator[tuple[Built, torch.Tensor]]:
    """A small classifier every ten steps of gradient descent, with its dense Hessian."""
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 5, (128,), generator=g)
    x = (torch.randn(5, 8, generator=g)[y] + 0.8 * torch.randn(128, 8, generator=g)).double()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 5)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    built = Built(model, nn.CrossEntropyLoss(), (x, y))
    for step in range(10 * readings):
        optimizer.zero_grad()
        built.loss(model(x), y).backward()
        if step % 10 == 0:
            yield built, by_rows(model, built.loss(model(x), y))
        optimizer.step()


def by_rows(model: nn.Module, loss: torch.Tensor) -> torch.Tensor:
    """The dense Hessian, by a backward through every entry of the gradient."""
    params = list(model.parameters())
    grad_D = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, params, create_graph=True)])
    units_DD = torch.eye(len(grad_D), dtype=grad_D.dtype)
    rows = torch.autograd.grad(grad_D, params, grad_outputs=units_DD, is_grads_batched=True)
    return torch.cat([r.reshape(len(grad_D), -1) for r in rows], 1)


def rotated(spectrum: list[float]) -> torch.Tensor:
    q, _ = torch.linalg.qr(torch.randn(60, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    values = torch.tensor(spectrum + torch.linspace(-1, 1, 60 - len(spectrum)).tolist(), dtype=torch.float64)
    return q @ torch.diag(values) @ q.T


def test_never_above_the_true_value_of_the_same_rank_and_within_the_residual_of_one() -> None:
    matrix = rotated([9.0, 7.0, 4.0])
    truth = torch.linalg.eigvalsh(matrix).flip(0).numpy()
    for seed in range(50):
        start_D = torch.randn(60, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        top = top_eigenpairs(DenseOperator(matrix), start_D, k=4, tol=0.0, max_products=4 + seed % 12)
        assert (top.values <= truth[:4] + 1e-9).all()
        for value, residual, v_D in zip(top.values, top.residuals, top.vectors_kD, strict=True):
            assert np.abs(truth - value).min() <= residual + 1e-9
            assert float((matrix @ v_D - value * v_D).norm()) == pytest.approx(residual, abs=1e-8)
        assert top.products == 4 + seed % 12
        assert not top.converged


def test_a_warm_start_saves_products() -> None:
    matrix = rotated([9.0, 7.0, 4.0])
    operator, start_D = DenseOperator(matrix), torch.randn(60, dtype=torch.float64)
    cold = top_eigenpairs(operator, start_D, k=3, tol=0.02, max_products=40)
    kept_D = cold.kept()
    assert kept_D is not None
    warm = top_eigenpairs(operator, kept_D, k=3, tol=0.02, max_products=40)
    assert cold.converged
    assert warm.converged
    assert warm.products <= cold.products - 2


def test_gap_and_ratio() -> None:
    assert largest_gap(np.array([9.0, 8.0, 2.0, 1.5])) == (2.0, 4.0)
    assert largest_gap(np.array([9.0, 1.0, -2.0, np.nan])) == (1.0, 9.0)
    assert np.isnan(largest_gap(np.array([9.0, -1.0, -2.0]))).all()
    v_kD = torch.eye(4)[:2]
    assert float(concentration(v_kD, torch.tensor([3.0, 0.0, 4.0, 0.0]))) == pytest.approx(9 / 25)
    assert torch.isnan(concentration(v_kD, torch.zeros(4)))


def test_few_different_eigenvalues_leave_the_rest_nan() -> None:
    """Half the squared length has one eigenvalue, as often as there are parameters."""
    x = torch.eye(6, dtype=torch.float64)
    built = Built(nn.Linear(6, 1, bias=False).double(), lambda call, batch: call(batch)[:, 0].square() * 3, x)
    values, _, _ = take(Outliers(), built)
    assert values["eigenvalue_1"] == pytest.approx(1.0)
    assert np.isnan(values["eigenvalue_2"])
    assert values["converged"] == 1.0


def test_a_broken_model_is_nan_and_is_forgotten() -> None:
    built: Any = case("mlp")
    _, state, _ = take(Outliers(), built)
    kept = built.model[0].weight.detach().clone()
    with torch.no_grad():
        built.model[0].weight.fill_(torch.nan)
    values, state, _ = take(Outliers(), built, state=state)
    assert all(np.isnan(values[name]) for name in EIGENVALUES)
    assert np.isnan(float(values["concentration"]))
    assert (values["converged"], state["kept_D"]) == (0.0, None)
    with torch.no_grad():
        built.model[0].weight.copy_(kept)
    assert take(Outliers(), built, state=state)[0]["converged"] == 1.0


def test_settings_that_mean_nothing_are_refused() -> None:
    for settings in ({"k": 0}, {"k": 11}, {"k": 5, "max_products": 5}):
        with pytest.raises(ValueError, match="expected"):
            Outliers(**settings)
