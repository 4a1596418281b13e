"""rho = 1 is the edge: torch's own optimizers on a quadratic, their second moment held fixed, decay below and diverge
above it. And each reader refuses what it does not know.

Shapes: D = 12 coordinates in three groups of four (`frozen_moments`).
"""

import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from frozen_moments import Groups, Held, same, three
from torch import Tensor, nn, optim

from instruments.layout import Layout
from instruments.preconditioners import Scale, headroom, read_preconditioner, reads, registry
from instruments.refusal import Refusal

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
    "asgd": (optim.ASGD, same(lambd=0.5, weight_decay=0.2)),
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
    check_edge(make, groups, seed)


OVER_LISTS = ("heavy_ball", "asgd", "adam", "adamw", "nadam", "radam", "adamax", "adagrad", "adadelta", "adafactor",
              "rmsprop_centred")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "variant"),
    [(name, "foreach") for name in OVER_LISTS] + [(name, "fused") for name in ("nesterov", "adam", "adamw", "adagrad")],
)
def test_rho_is_the_edge_of_other_implementations(name: str, variant: str) -> None:
    make, groups = CASES[name]
    check_edge(lambda given: make(given, **{variant: True}), groups, 0)


@pytest.mark.parametrize("seed", range(8))
def test_rho_is_the_edge_of_three_optimizers_on_one_problem(seed: int) -> None:
    drawn = random.Random(seed)
    chosen = [CASES[name] for name in drawn.sample(sorted(CASES), 3)]
    groups = [dict(drawn.choice(groups)) for _, groups in chosen]
    for (make, _), group in zip(chosen, groups, strict=True):
        group["lr"] *= 1.0 if make is optim.Adafactor else 10 ** drawn.uniform(-1, 0.5)
    check_edge(three(*((make, {}) for make, _ in chosen)), groups, seed)


def check_edge(make: Callable[..., Any], groups: Groups, seed: int) -> None:
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


EVERY = sorted((c for c in registry.READERS if c.__module__.startswith("torch.optim")), key=lambda c: c.__name__)
FUSED = (optim.SGD, optim.Adam, optim.AdamW, optim.Adagrad)
VARIANTS = [(cls, {"foreach": True}) for cls in EVERY] + [(cls, {"fused": True}) for cls in FUSED]


@pytest.mark.parametrize(("cls", "variant"), VARIANTS)
def test_variants_are_read_the_same(cls: Any, variant: dict[str, Any]) -> None:
    """Over lists of tensors and fused; then with what capturable optimizers keep: tensors for numbers."""
    torch.manual_seed(0)
    start, history = torch.randn(3, 2), torch.randn(3, 3, 2)
    read = []
    for settings in ({}, variant):
        p = nn.Parameter(start.clone())
        optimizer, layout = cls([p], lr=0.01, weight_decay=0.1, **settings), Layout(("p",), (p,))
        for grad in history:
            p.grad = grad.clone()
            with torch.no_grad():
                optimizer.step()
            p.data.copy_(start)
        read.append(read_preconditioner([optimizer], layout, [history[0]]))
    for group in optimizer.param_groups:
        settings = {"lr": torch.tensor(0.01), "capturable": True}
        group.update({**settings, "betas": tuple(map(torch.tensor, group["betas"]))} if "betas" in group else settings)
    read.append(read_preconditioner([optimizer], layout, [history[0]]))
    for one in read[1:]:
        assert torch.allclose(one.scale_D, read[0].scale_D, rtol=1e-5)
        assert torch.equal(one.decay_D, read[0].decay_D)


def test_every_optimizer_of_torch_is_read_or_refused_with_a_reason() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    p.grad = torch.ones(2, 2)
    layout, reasons = Layout(("p",), (p,)), {}
    for name in dir(optim):
        cls = getattr(optim, name)
        if isinstance(cls, type) and issubclass(cls, optim.Optimizer) and cls is not optim.Optimizer:
            try:
                assert (read_preconditioner([cls([p], lr=0.01)], layout, [p.grad]).scale_D > 0).all()
            except Refusal as refusal:
                reasons[name] = str(refusal)
    assert set(reasons) == {"LBFGS", "Muon", "Rprop", "SparseAdam"}
    for name, reason in reasons.items():
        assert reason.startswith(f"preconditioned sharpness is not defined for {name}: ")
        assert "step/step_ratio (r, edge 1) and curvature/batch_sharpness" in reason


@pytest.mark.parametrize("name", ["Lion", "SignSGD", "MyMuon"])
def test_steps_that_are_not_linear_are_refused_by_name(name: str) -> None:
    base = optim.Muon if name == "MyMuon" else optim.Optimizer
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = type(name, (base,), {"__init__": lambda self: optim.Optimizer.__init__(self, [p], {})})()
    with pytest.raises(Refusal, match=f"not defined for {name}: .*not linear.*step/step_ratio"):
        read_preconditioner([optimizer], Layout(("p",), (p,)), [p])


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
    monkeypatch.setattr(registry, "READERS", dict(registry.READERS))
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    layout = Layout(("p",), (p,))

    class Renamed(optim.Adam):
        """Same step."""

    class Changed(optim.Adam):
        def step(self, closure: Any = None) -> Any:
            return None

    class Unknown:
        param_groups = ({"params": [p]},)

        def step(self) -> None: ...

    read_preconditioner([Renamed([p])], layout, [p.grad])
    with pytest.raises(Refusal, match="overrides the step of Adam"):
        read_preconditioner([Changed([p])], layout, [p.grad])
    with pytest.raises(Refusal, match=r"no preconditioner reader for Unknown \(known: .*, SGD"):
        read_preconditioner([Unknown()], layout, [p.grad])
    with pytest.raises(Refusal, match="maximizes"):
        read_preconditioner([optim.SGD([p], lr=0.1, maximize=True)], layout, [p.grad])

    @reads(Changed)
    def changed(group: Any, state: Any, p: Tensor, grad: Tensor) -> Any:
        return Scale(0.5)

    assert read_preconditioner([Changed([p])], layout, [p.grad]).scale_D.tolist() == [0.5, 0.5]


def test_headroom() -> None:
    assert headroom(0.5) == 2
    assert headroom(0.0) == headroom(-1.0) == float("inf")


def test_without_any_gradient_there_is_no_step_to_read() -> None:
    model = nn.Linear(2, 1)
    layout = Layout.of(model)
    with pytest.raises(Refusal, match=r"read between backward\(\) and zero_grad\(\)"):
        read_preconditioner([torch.optim.Adam(model.parameters())], layout, [None, None])
