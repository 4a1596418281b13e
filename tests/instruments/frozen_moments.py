"""Optimizers on a quadratic whose preconditioner stays what it is: rho = 1 is then their edge.

Shapes: D = 12 coordinates in three parameters of four.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from instruments.layout import Layout
from instruments.operators.operator import DenseOperator
from instruments.operators.preconditioned import PreconditionedOperator
from instruments.preconditioners import read_preconditioner

STEPS = 3000
Groups = list[dict[str, Any]]


def hessian(seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(12, 12, generator=g, dtype=torch.float64))
    return q @ torch.diag(torch.logspace(-1, 1, 12, dtype=torch.float64)) @ q.T


def hold_state(cls: Any, group: Any, state: Any, grad: Tensor, v: Tensor, mean: Tensor) -> None:
    """Set the state of one parameter so that the next step uses v, whatever the gradient is."""
    state["step"] = torch.tensor(1e5)
    for name in ("exp_avg", "momentum_buffer"):
        state.setdefault(name, torch.zeros_like(grad))
    if cls in (optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam):
        beta2 = group["betas"][1]
        state["exp_avg_sq"] = (v - (1 - beta2) * grad**2) / beta2
        state["max_exp_avg_sq"] = 0.5 * v  # below v: the maximum is v
        state["mu_product"] = torch.tensor(0.0)  # the product of many momenta
    elif cls is optim.RMSprop:
        alpha = group["alpha"]
        state["square_avg"] = (v - (1 - alpha) * grad**2) / alpha
        state["grad_avg"] = (mean - (1 - alpha) * grad) / alpha
    elif cls is optim.Adamax:
        state["exp_inf"] = v / group["betas"][1]  # the gradients of this test are far below v
    elif cls is optim.Adagrad:
        state["sum"], state["step"] = v - grad**2, torch.tensor(3.0)
    elif cls is optim.Adadelta:
        rho = group["rho"]
        state["square_avg"], state["acc_delta"] = (v - (1 - rho) * grad**2) / rho, mean.clone()
    elif cls is optim.ASGD:
        state["eta"] = torch.tensor(group["lr"], dtype=torch.float64)
        state["mu"], state["ax"] = torch.tensor(1.0), torch.zeros_like(grad)
    elif cls is optim.Adafactor:
        state["step"] = torch.tensor(9.0)
        forget = 10.0 ** group["beta2_decay"]
        state["variance"] = (v - forget * grad**2) / (1 - forget)
        state["row_var"] = state["col_var"] = None


class Held:
    """One optimizer or several on 1/2 x'Hx whose second moments are set before every step so that the update brings
    them back to `targets`. `make` gets three parameter groups of one parameter each."""

    def __init__(
        self,
        make: Callable[[Groups], Any],
        groups: list[dict[str, Any]],
        seed: int,
        *,
        hold: Callable[..., None] = hold_state,
        shape: tuple[int, ...] = (4,),
    ) -> None:
        g = torch.Generator().manual_seed(seed + 100)
        self.h, self.hold_state = hessian(seed), hold
        self.model = nn.ParameterList(
            [nn.Parameter(1e-6 * torch.randn(4, generator=g, dtype=torch.float64).view(shape)) for _ in range(3)]
        )
        made = make([{**group, "params": [p]} for group, p in zip(groups, self.model, strict=True)])
        self.optimizers = made if isinstance(made, list) else [made]
        self.groups = [(optimizer, group) for optimizer in self.optimizers for group in optimizer.param_groups]
        self.targets = [torch.rand(4, generator=g, dtype=torch.float64) + 0.05 for _ in range(3)]
        self.means = [0.1 * torch.rand(4, generator=g, dtype=torch.float64) for _ in range(3)]
        self.rates = [float(group["lr"]) for _, group in self.groups]

    def gradient(self) -> None:
        grads = (self.h @ self.x()).split(4)
        for p, grad in zip(self.model, grads, strict=True):
            p.grad = grad.view_as(p).clone()

    def hold(self) -> None:
        for (optimizer, group), v, mean in zip(self.groups, self.targets, self.means, strict=True):
            p = group["params"][0]
            decoupled = group.get("decoupled_weight_decay", False)
            coupled = 0.0 if decoupled else group.get("weight_decay", 0.0)
            grad = p.grad + coupled * p.detach()
            self.hold_state(type(optimizer), group, optimizer.state[p], grad, v, mean)

    def rho(self) -> float:
        self.gradient()
        self.hold()
        layout = Layout.of(self.model)
        p = read_preconditioner(self.optimizers, layout, [q.grad for q in layout.params])
        operator = PreconditionedOperator(DenseOperator(self.h), p.scale_D, p.decay_D, p.basis)
        matrix_DD = torch.stack([operator.matvec(v_D) for v_D in torch.eye(12, dtype=torch.float64)])
        return float(torch.linalg.eigvalsh(matrix_DD)[-1]) / 2

    def scale_to(self, rho: float) -> None:
        """Multiply all learning rates by one factor until rho is what is asked (decay makes it a little non-linear)."""
        factor = 1.0
        for _ in range(60):
            for (_, group), rate in zip(self.groups, self.rates, strict=True):
                group["lr"] = rate * factor
            found = self.rho()
            if abs(found / rho - 1) < 1e-12:
                break
            factor *= rho / found
        assert found == pytest.approx(rho, rel=1e-9)

    def fate(self) -> str:
        """ "diverges" once |x| is a thousand times what it was, "decays" once it is a thousandth of it, or when it has
        halved by the end."""
        start = self.norm()
        for _ in range(STEPS):
            self.gradient()
            self.hold()
            for optimizer in self.optimizers:
                optimizer.step()
            if self.norm() > 1e3 * start:
                return "diverges"
            if self.norm() < 1e-3 * start:
                return "decays"
        return "decays" if self.norm() < start / 2 else "neither"

    def x(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.model])

    def norm(self) -> float:
        return float(self.x().norm())


def same(**settings: Any) -> Groups:
    return [{"lr": 0.1, **settings}] * 3


def three(*kinds: tuple[Any, dict[str, Any]]) -> Callable[[Groups], list[Any]]:
    """An optimizer of another class for each of the three parameters."""
    return lambda groups: [kind([{**group, **settings}]) for (kind, settings), group in zip(kinds, groups, strict=True)]
