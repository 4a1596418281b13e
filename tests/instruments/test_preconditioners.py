"""rho = 1 is the edge: torch's own optimizers on a quadratic, their second moment held fixed, decay below and diverge
above it. And each reader refuses what it does not know.

Shapes: D = 12 coordinates in three groups of four.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from instruments.layout import Layout
from instruments.preconditioners import headroom, read_preconditioner, reads
from instruments.refusal import Refusal

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
        state.setdefault(name, torch.zeros(4, dtype=torch.float64))
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
    elif cls is optim.Adafactor:
        state["step"] = torch.tensor(9.0)
        forget = 10.0 ** group["beta2_decay"]
        state["variance"] = (v - forget * grad**2) / (1 - forget)
        state["row_var"] = state["col_var"] = None


class Held:
    """An optimizer on 1/2 x'Hx whose preconditioner stays what it is: before every step the stored second moment is set
    so that the update brings it back to `target`."""

    def __init__(self, make: Callable[[Groups], optim.Optimizer], groups: list[dict[str, Any]], seed: int) -> None:
        g = torch.Generator().manual_seed(seed + 100)
        self.h = hessian(seed)
        self.model = nn.ParameterList(
            [nn.Parameter(1e-6 * torch.randn(4, generator=g, dtype=torch.float64)) for _ in range(3)]
        )
        self.optimizer = make([{**group, "params": [p]} for group, p in zip(groups, self.model, strict=True)])
        self.targets = [torch.rand(4, generator=g, dtype=torch.float64) + 0.05 for _ in range(3)]
        self.means = [0.1 * torch.rand(4, generator=g, dtype=torch.float64) for _ in range(3)]
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def gradient(self) -> None:
        grads = (self.h @ torch.cat(list(self.model))).detach().split(4)
        for p, grad in zip(self.model, grads, strict=True):
            p.grad = grad.clone()

    def hold(self) -> None:
        for group, v, mean in zip(self.optimizer.param_groups, self.targets, self.means, strict=True):
            p = group["params"][0]
            state = self.optimizer.state[p]
            coupled = 0.0 if group.get("decoupled_weight_decay", False) else group["weight_decay"]
            hold_state(type(self.optimizer), group, state, p.grad + coupled * p.detach(), v, mean)

    def rho(self) -> float:
        self.gradient()
        self.hold()
        layout = Layout.of(self.model)
        p = read_preconditioner([self.optimizer], layout, [q.grad for q in layout.params])
        root = p.scale_D.sqrt()
        return float(torch.linalg.eigvalsh(root[:, None] * (self.h + torch.diag(p.decay_D)) * root)[-1]) / 2

    def scale_to(self, rho: float) -> None:
        """Multiply all learning rates by one factor until rho is what is asked (decay makes it a little non-linear)."""
        factor = 1.0
        for _ in range(60):
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
            factor *= rho / self.rho()
        assert self.rho() == pytest.approx(rho, rel=1e-9)

    def fate(self) -> str:
        """ "diverges" once |x| is a thousand times what it was, "decays" when it has halved by the end."""
        start = self.norm()
        for _ in range(STEPS):
            self.gradient()
            self.hold()
            self.optimizer.step()
            if self.norm() > 1e3 * start:
                return "diverges"
        return "decays" if self.norm() < start / 2 else "neither"

    def norm(self) -> float:
        return float(torch.cat(list(self.model)).detach().norm())


def same(**settings: Any) -> Groups:
    return [{"lr": 0.1, **settings}] * 3


CASES: Mapping[str, tuple[Callable[..., optim.Optimizer], Groups]] = {
    "sgd": (optim.SGD, same()),
    "sgd_l2": (optim.SGD, same(weight_decay=0.5)),
    "heavy_ball": (optim.SGD, same(momentum=0.9)),
    "dampened": (optim.SGD, same(momentum=0.8, dampening=0.5)),
    "ema": (optim.SGD, same(momentum=0.9, dampening=0.9)),
    "nesterov": (optim.SGD, same(momentum=0.9, nesterov=True)),
    "sgd_mixed": (
        optim.SGD,
        [
            {"lr": 0.01},
            {"lr": 0.3, "momentum": 0.9, "nesterov": True},
            {"lr": 0.1, "momentum": 0.5, "weight_decay": 1.0},
        ],
    ),
    "adam": (optim.Adam, same()),
    "adam_no_momentum": (optim.Adam, same(betas=(0.0, 0.99))),
    "adam_l2": (optim.Adam, same(weight_decay=0.3)),
    "amsgrad": (optim.Adam, same(amsgrad=True)),
    "adamw": (optim.AdamW, same(weight_decay=0.5)),
    "adam_mixed": (
        optim.Adam,
        [
            {"lr": 0.01, "betas": (0.9, 0.999)},
            {"lr": 0.3, "betas": (0.5, 0.99), "eps": 0.5},
            {"lr": 0.1, "betas": (0.95, 0.9), "weight_decay": 0.2},
        ],
    ),
    "adamw_mixed": (
        optim.AdamW,
        [{"lr": 0.02, "weight_decay": 2.0}, {"lr": 0.2, "betas": (0.0, 0.9)}, {"lr": 0.1, "eps": 0.1}],
    ),
    "nadam": (optim.NAdam, same()),
    "nadam_decoupled": (optim.NAdam, same(weight_decay=0.3, decoupled_weight_decay=True)),
    "radam": (optim.RAdam, same(weight_decay=0.2)),
    "adamax": (optim.Adamax, same(weight_decay=0.1)),
    "adagrad": (optim.Adagrad, same(lr_decay=0.1)),
    "adadelta": (optim.Adadelta, same(weight_decay=0.1)),
    "adafactor": (optim.Adafactor, [{"lr": 0.001, "beta2_decay": -3.0, "eps": (None, 1.0), "weight_decay": 0.5}] * 3),
    "rmsprop": (optim.RMSprop, same()),
    "rmsprop_momentum": (optim.RMSprop, same(momentum=0.9, alpha=0.9)),
    "rmsprop_centred": (optim.RMSprop, same(centered=True, momentum=0.5, weight_decay=0.1)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_rho_is_the_edge(name: str, seed: int) -> None:
    make, groups = CASES[name]
    for rho, fate in ((0.97, "decays"), (1.03, "diverges")):
        held = Held(make, groups, seed)
        held.scale_to(rho)
        assert held.fate() == fate, f"rho = {rho}"


OTHERS = (optim.NAdam, optim.RAdam, optim.Adamax, optim.Adagrad, optim.Adadelta, optim.Adafactor)


@pytest.mark.parametrize("make", OTHERS)
@pytest.mark.parametrize("shape", [(5,), (3, 4)])
@pytest.mark.parametrize("steps", [0, 1, 4, 5, 30])
def test_the_step_is_d_times_the_direction(make: Any, shape: tuple[int, ...], steps: int) -> None:
    """What is read before a step accounts for the step that torch then takes, with factored and rectified moments."""
    torch.manual_seed(steps)
    start, history = torch.randn(shape, dtype=torch.float64), torch.randn(steps, *shape, dtype=torch.float64)
    last = torch.randn(shape, dtype=torch.float64)

    def moved(final: Tensor) -> tuple[Tensor, Tensor]:
        p = nn.Parameter(start.clone())
        optimizer = make([p], lr=0.01)
        for grad in history:
            p.grad = grad.clone()
            optimizer.step()
        p.grad = final.clone()
        before = p.detach().clone()
        layout = Layout(("p",), (p,))
        scale_D = read_preconditioner([optimizer], layout, [p.grad]).scale_D
        optimizer.step()
        return p.detach() - before, scale_D.view(shape)

    step, scale = moved(last)
    if make in (optim.Adagrad, optim.Adadelta, optim.Adafactor):  # F = 1: the whole step is -D g
        assert torch.allclose(step, -scale * last, rtol=1e-9)
    elif make is optim.NAdam:
        assert (scale > 0).all()
    elif steps == 0:  # the average is (1 - b1) g: the step is -D g (1 - b1) / F(-1) = -D g (1 + b1)
        assert torch.allclose(step, -scale * last * 1.9, rtol=1e-9)


@pytest.mark.parametrize("make", [optim.Adam, optim.AdamW, optim.RMSprop, optim.SGD])
@pytest.mark.parametrize("steps", [0, 1, 30])
def test_the_preconditioner_is_that_of_the_step_about_to_be_taken(make: Any, steps: int) -> None:
    """At steps with their own state, the predicted v is the one that the optimizer then stores; nothing is written."""
    torch.manual_seed(steps)
    p = nn.Parameter(torch.randn(5, dtype=torch.float64))
    optimizer = make([p], lr=0.01)
    for _ in range(steps):
        p.grad = torch.randn(5, dtype=torch.float64)
        optimizer.step()
    p.grad = torch.randn(5, dtype=torch.float64)
    layout = Layout(("p",), (p,))
    before = {k: v.clone() for k, v in optimizer.state.get(p, {}).items() if isinstance(v, Tensor)}
    scale_D = read_preconditioner([optimizer], layout, [p.grad]).scale_D
    assert (p in optimizer.state) == bool(before)
    assert all(torch.equal(before[k], optimizer.state[p][k]) for k in before)
    optimizer.step()
    state, t = optimizer.state[p], steps + 1
    if make in (optim.Adam, optim.AdamW):
        shrink = 1 - 0.01 * 0.01 / 2 if make is optim.AdamW else 1.0
        v = state["exp_avg_sq"] / (1 - 0.999**t)
        expected = 0.01 / 19 / ((1 - 0.9**t) * (v.sqrt() + 1e-8) * shrink)
    elif make is optim.RMSprop:
        expected = 0.01 / (state["square_avg"].sqrt() + 1e-8)
    else:
        expected = torch.full((5,), 0.01, dtype=torch.float64)
    assert torch.allclose(scale_D, expected, rtol=1e-12)


@pytest.mark.parametrize("variant", [{"foreach": True}, {"fused": True}, {"capturable": False, "foreach": False}])
def test_variants_of_adam_read_the_same(variant: dict[str, bool]) -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(4))
    optimizer = optim.Adam([p], lr=torch.tensor(0.01) if variant.get("foreach") is False else 0.01, **variant)  # type: ignore[arg-type]
    plain = optim.Adam([p], lr=0.01)
    for o in (optimizer, plain):
        p.grad = torch.ones(4)
        value = p.detach().clone()
        o.step()
        p.data.copy_(value)
    layout = Layout(("p",), (p,))
    read = [read_preconditioner([o], layout, [p.grad]).scale_D for o in (optimizer, plain)]
    assert torch.allclose(read[0], read[1], rtol=1e-6)


def test_parameters_outside_any_optimizer_do_not_move() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = optim.SGD(model[1].parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    layout = Layout.of(model)
    p = read_preconditioner([optimizer], layout, [q.grad for q in layout.params])
    assert p.group_of == (-1, -1, 0, 0)
    assert torch.equal(p.scale_D, torch.tensor([0.0] * 6 + [0.1] * 3))


def test_unknown_optimizers_are_refused_and_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    from instruments import preconditioners

    monkeypatch.setattr(preconditioners, "READERS", dict(preconditioners.READERS))
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    layout = Layout(("p",), (p,))

    class Renamed(optim.Adam):
        """Same step."""

    class Changed(optim.Adam):
        def step(self, closure: Any = None) -> Any:
            return None

    read_preconditioner([Renamed([p])], layout, [p.grad])
    with pytest.raises(Refusal, match="overrides the step of Adam"):
        read_preconditioner([Changed([p])], layout, [p.grad])
    with pytest.raises(Refusal, match=r"no preconditioner reader for ASGD \(known: Adadelta, .*, SGD\)"):
        read_preconditioner([optim.ASGD([p])], layout, [p.grad])
    with pytest.raises(Refusal, match=r"not defined for Rprop: .*; read step/step_ratio"):
        read_preconditioner([optim.Rprop([p])], layout, [p.grad])
    with pytest.raises(Refusal, match="maximizes"):
        read_preconditioner([optim.SGD([p], lr=0.1, maximize=True)], layout, [p.grad])

    @reads(Changed)
    def changed(group: Any, state: Any, p: Tensor, grad: Tensor) -> Any:
        return preconditioners.Scale(0.5)

    assert read_preconditioner([Changed([p])], layout, [p.grad]).scale_D.tolist() == [0.5, 0.5]


def test_headroom() -> None:
    assert headroom(0.5) == 2
    assert headroom(0.0) == headroom(-1.0) == float("inf")
