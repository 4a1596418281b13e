"""Optimizers of a user's own, registered by a function: rho = 1 is the edge for a preconditioner that is no diagonal
and for schedule-free steps, alone and mixed with torch's. And what a basis must be.

Shapes: D = 12 coordinates in three parameters of four (`frozen_moments`).
"""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from frozen_moments import Groups, Held, hold_state, same, three
from taking import case, take
from torch import Tensor, nn, optim
from twins import dense_hessian

from instruments.curvature.preconditioned_sharpness import PreconditionedSharpness
from instruments.layout import Layout
from instruments.operators.operator import DenseOperator
from instruments.operators.preconditioned import PreconditionedOperator
from instruments.preconditioners import Scale, average, edge_gain, read_preconditioner, reads, sharpness_edge

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "third_party_optimizer.py"))
Shampoo, ScheduleFreeSGD = EXAMPLE["Shampoo"], EXAMPLE["ScheduleFreeSGD"]


class ScheduleFreeAdamW(optim.Optimizer):
    """Defazio et al. 2024, appendix: the gradient over sqrt(v), decay at y. The parameters are y."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.0, beta2: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "beta2": beta2})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for y in group["params"]:
                state, beta2, t = self.state[y], group["beta2"], self.state[y]["t"] + 1
                v = average(state["v"], y.grad.square(), beta2)
                z, c = state.get("z", y.clone()), 1 / t
                x = (y - 0.1 * z) / 0.9
                z = z - group["lr"] * (y.grad / (v / (1 - beta2**t)).sqrt() + group["weight_decay"] * y)
                y.copy_(0.1 * z + 0.9 * ((1 - c) * x + c * z))
                state.update(z=z, v=v, t=t)


@reads(ScheduleFreeAdamW)
def schedule_free_adamw(group: Any, state: Any, y: Tensor, grad: Tensor) -> Scale:
    """Decay takes the way of the gradient after the preconditioner: c = weight_decay * p."""
    t = state["t"] + 1
    p = (average(state["v"], grad.square(), group["beta2"]) / (1 - group["beta2"] ** t)).sqrt()
    return Scale(group["lr"] * (0.1 + 0.9 * edge_gain(1 - 1 / t)) / p, decay=group["weight_decay"] * p)


class Soap(optim.Optimizer):
    """Adam in the eigenvectors of Shampoo's factors (Vyas et al. 2024), these held as they are, v merged to a row."""

    def __init__(self, params: Any, lr: float = 0.1, beta1: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "beta1": beta1, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, beta1 = group["lr"], group["beta1"]
            for p in group["params"]:
                state, (rows, columns) = self.state[p], self.state[p]["basis"]
                state["m"] = average(state.get("m", torch.zeros_like(p)), p.grad, beta1)
                p.mul_(1 - lr * group["weight_decay"])
                p.sub_(lr * rows @ ((rows.T @ state["m"] @ columns) / state["v"].sqrt()) @ columns.T)


@reads(Soap)
def soap(group: Any, state: Any, p: Tensor, grad: Tensor) -> Scale:
    shrink = 1 - group["lr"] * group["weight_decay"] / 2
    return Scale(group["lr"] * edge_gain(group["beta1"]) / (state["v"].sqrt() * shrink), basis=state["basis"])


def hold(cls: Any, group: Any, state: Any, grad: Tensor, v: Tensor, mean: Tensor) -> None:
    """The same preconditioner and the same c at every step; for torch's own, what `hold_state` does."""
    if cls is Shampoo:
        left, right = torch.outer(v[:2], v[:2]), torch.outer(mean[2:], mean[2:])
        state["statistics"] = [left + torch.diag(v[2:]), right + torch.diag(v[:2])]
    elif cls is ScheduleFreeSGD:
        state["t"] = 9
    elif cls is ScheduleFreeAdamW:
        beta2, state["t"] = group["beta2"], 9
        state["v"] = (v.view_as(grad) - (1 - beta2) * grad**2) / beta2
    elif cls is Soap:
        state["basis"] = [torch.linalg.qr(torch.outer(u, u) + torch.eye(2).double())[0] for u in (v[:2], mean[2:])]
        state["v"] = v.view_as(grad)
    else:
        hold_state(cls, group, state, grad, v.view_as(grad), mean.view_as(grad))


CASES: dict[str, tuple[Callable[..., Any], Groups]] = {
    "shampoo": (Shampoo, same()),
    "shampoo_groups": (Shampoo, [{"lr": 0.02}, {"lr": 0.3, "momentum": 0.0}, {"lr": 0.1, "momentum": 0.5}]),
    "schedule_free": (ScheduleFreeSGD, same()),
    "schedule_free_decay": (ScheduleFreeSGD, [{"lr": 0.1, "weight_decay": 0.5}, {"lr": 0.3, "beta": 0.5}, {"lr": 0.1}]),
    "schedule_free_adamw": (ScheduleFreeAdamW, same(weight_decay=0.5)),
    "soap": (Soap, same(weight_decay=0.3)),
    "mixed": (three((Shampoo, {}), (ScheduleFreeSGD, {}), (ScheduleFreeAdamW, {"lr": 0.05})), same()),
    "mixed_with_torch": (three((Soap, {}), (optim.AdamW, {"lr": 0.2}), (optim.SGD, {"momentum": 0.9})), same()),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_rho_is_the_edge(name: str, seed: int) -> None:
    make, groups = CASES[name]
    for rho, fate in ((0.97, "decays"), (1.03, "diverges")):
        held = Held(make, groups, seed, hold=hold, shape=(2, 2))
        held.scale_to(rho)
        assert held.fate() == fate, f"rho = {rho}"


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 2)])
def test_shampoo_steps_as_read(shape: tuple[int, ...]) -> None:
    """Without momentum the step is -D g, its statistics and all."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    optimizer, layout = Shampoo([p], momentum=0.0), Layout(("p",), (p,))
    for _ in range(3):
        p.grad, before = torch.randn_like(p), p.detach().clone()
        step_D = read_preconditioner([optimizer], layout, [p.grad]).times(p.grad.reshape(-1))
        optimizer.step()
        assert torch.allclose(p.detach() - before, -step_D.view(shape), rtol=1e-9)


def test_a_reading_is_that_of_the_dense_matrices_and_its_mass_the_elasticity() -> None:
    """lambda_max of D H with D from its columns; d log rho / d log eta of the first group by a small change of it."""
    built = case("mlp")
    first, second = list(built.model.parameters())[:2], list(built.model.parameters())[2:]
    optimizer = Shampoo([{"params": first, "lr": 0.3}, {"params": second, "lr": 0.1}], momentum=0.5)
    optimizer.step()
    layout, h_DD = Layout.of(built.model), dense_hessian(built.model, built.loss, built.batch)
    rhos = []
    for lr in (0.3, 0.3 * 1.001):
        optimizer.param_groups[0]["lr"] = lr
        p = read_preconditioner([optimizer], layout, [q.grad for q in layout.params])
        d_DD = torch.stack([p.times(e_D) for e_D in torch.eye(layout.size, dtype=torch.float64)], dim=1)
        assert not torch.allclose(d_DD, torch.diag(d_DD.diag()), rtol=1e-2)
        rhos.append(float(torch.linalg.eigvals(d_DD @ h_DD).real.max()) / 2)
        values, _, _ = take(PreconditionedSharpness(tol=1e-6), built, [optimizer])
        assert float(values["rho"]) == pytest.approx(rhos[-1], rel=1e-6)
    mass = (rhos[1] / rhos[0] - 1) / 0.001
    assert values["group_mass"].tolist() == pytest.approx([mass, 1 - mass], abs=1e-3)
    assert 0.02 < mass < 0.98


class AsTold:
    """One parameter, read as it is told; no optimizer of torch's."""

    def __init__(self, p: Tensor, scale: Scale) -> None:
        self.param_groups = [{"params": [p], "scale": scale}]

    def step(self) -> None: ...


@reads(AsTold)
def as_told(group: Any, state: Any, p: Tensor, grad: Tensor) -> Scale:
    told: Scale = group["scale"]
    return told


def rotated(step_size: Tensor, basis: Any, p: Tensor) -> Any:
    layout = Layout(("p",), (p,))
    return read_preconditioner([AsTold(p, Scale(step_size, basis=basis))], layout, [torch.ones_like(p)])


@pytest.mark.parametrize("merged", [(2, 3, 2), (6, 2), (12,)])
def test_a_basis_is_the_kronecker_product_of_its_matrices(merged: tuple[int, ...]) -> None:
    """On the dimensions of the parameter or on merged ones, None for the identity; against the dense matrix."""
    torch.manual_seed(len(merged))
    qs = [torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for n in merged]
    if len(qs) > 1:
        qs[1] = torch.eye(merged[1], dtype=torch.float64)
    d = torch.rand(merged, dtype=torch.float64)
    p = rotated(d, [None if len(qs) > 1 and k == 1 else q for k, q in enumerate(qs)], torch.zeros(2, 3, 2).double())
    q_DD = qs[0]
    for q in qs[1:]:
        q_DD = torch.kron(q_DD.contiguous(), q.contiguous())
    d_DD = q_DD @ torch.diag(d.reshape(-1)) @ q_DD.T
    v_D, h_DD = torch.randn(12, dtype=torch.float64), torch.randn(12, 12, dtype=torch.float64)
    assert torch.allclose(p.times(v_D), d_DD @ v_D)

    class Remembering(DenseOperator):
        def known(self) -> list[tuple[Tensor, Tensor]]:
            return [(v_D, self.matvec(v_D))]

    c_D = torch.rand(12, dtype=torch.float64)
    operator = PreconditionedOperator(Remembering(h_DD + h_DD.T), p.scale_D, c_D, p.basis)
    matrix_DD = torch.stack([operator.matvec(e_D) for e_D in torch.eye(12, dtype=torch.float64)], dim=1)
    assert torch.allclose(matrix_DD, matrix_DD.T)
    expected = torch.linalg.eigvals(d_DD @ (h_DD + h_DD.T + torch.diag(c_D))).real.sort().values
    assert torch.allclose(torch.linalg.eigvalsh(matrix_DD), expected)
    for v, image in operator.known():
        assert torch.allclose(matrix_DD @ v, image)
    assert torch.allclose(p.root_times(v_D), p.scale_D.sqrt() * (q_DD.T @ v_D))


def test_equal_steps_in_any_basis_are_gradient_descent() -> None:
    q, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    p = rotated(torch.full((4,), 0.1, dtype=torch.float64), [q], torch.zeros(4).double())
    assert sharpness_edge(p) == pytest.approx(20)


def test_what_is_no_basis_is_refused() -> None:
    p, q = torch.zeros(2, 3), torch.eye(3)
    for step_size, basis in ((torch.ones(2, 3), [None]), (torch.ones(3), [q]), (torch.ones(2, 3), [q, q])):
        with pytest.raises(ValueError, match=r"for p \(6 scalars\) a step_size of as many scalars"):
            rotated(step_size, basis, p)
    with pytest.raises(ValueError, match="expected orthonormal columns in the basis of p"):
        rotated(torch.ones(2, 3), [None, 1.1 * q], p)
