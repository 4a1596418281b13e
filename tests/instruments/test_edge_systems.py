"""rho = 1 is the edge of 3,000 random systems: every coordinate has another optimizer, learning rate, momentum, decay
and second moment. rho is what the readers say; the truth is the companion matrix of the recursion, written out here.

Shapes: S = systems, D = 4 coordinates, each with the state x, m1, m2.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import optim

from instruments.preconditioners import Scale, edge_gain, reader_of

SYSTEMS, D = 3000, 4
Rng = np.random.Generator
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Recursion:
    """m_k+ = keep_k m_k + add_k g and x+ = (1 - omega) x - step (now g + sum_k use_k m_k+), with g = (H + diag c) x."""

    step: float
    now: float = 0.0
    use: tuple[float, float] = (0.0, 0.0)
    keep: tuple[float, float] = (0.0, 0.0)
    add: tuple[float, float] = (0.0, 0.0)
    omega: float = 0.0
    c: float = 0.0


@dataclass(frozen=True)
class Drawn:
    """An optimizer's settings and its state of one scalar parameter, where its reader is torch's; and what it does."""

    recursion: Recursion
    cls: Any = None
    settings: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    scale: Scale | None = None

    def read(self) -> Scale:
        if self.scale is not None:
            return self.scale
        optimizer = prototype(self.cls)
        zero = torch.zeros(1, dtype=torch.float64)
        state = {k: torch.tensor([v], dtype=torch.float64) for k, v in self.state.items()}
        return reader_of(optimizer)({**optimizer.param_groups[0], **self.settings}, state, zero, zero)


@cache
def prototype(cls: Any) -> Any:
    return cls([torch.zeros(1)], lr=0.1)


def rate(rng: Rng) -> float:
    return float(10 ** rng.uniform(-2, 0))


def beta(rng: Rng) -> float:
    return float(rng.choice([0.0, 0.5, 0.9, 0.99, rng.uniform(0, 0.95)]))


def some(rng: Rng, most: float) -> float:
    """0 half of the time."""
    return float(rng.uniform(0, most)) * bool(rng.integers(2))


def gradient_descent(rng: Rng) -> Drawn:
    lr, mu, c, kind = rate(rng), beta(rng), some(rng, 1.0), rng.integers(4)
    settings = {"lr": lr, "momentum": mu, "weight_decay": c}
    if kind == 0 or mu == 0:
        return Drawn(Recursion(lr, now=1.0, c=c), optim.SGD, {**settings, "momentum": 0.0})
    if kind == 1:
        nesterov = Recursion(lr, now=1.0, use=(mu, 0), keep=(mu, 0), add=(1, 0), c=c)
        return Drawn(nesterov, optim.SGD, {**settings, "nesterov": True})
    dampening = [mu, some(rng, 0.9)][kind - 2]  # an exponential average, and anything
    heavy_ball = Recursion(lr, use=(1, 0), keep=(mu, 0), add=(1 - dampening, 0), c=c)
    return Drawn(heavy_ball, optim.SGD, {**settings, "dampening": dampening})


def averaged(rng: Rng) -> Drawn:
    eta, lambd, c = rate(rng), some(rng, 0.5), some(rng, 1.0)
    return Drawn(
        Recursion(eta, now=1.0, omega=eta * lambd, c=c), optim.ASGD, {"lambd": lambd, "weight_decay": c}, {"eta": eta}
    )


def adam(rng: Rng) -> Drawn:
    lr, b1, b2, v, t = rate(rng), beta(rng), rng.uniform(0.5, 0.999), 10 ** rng.uniform(-4, 1), rng.integers(1, 200)
    eps, decay, decoupled = float(rng.choice([1e-8, 0.5])), some(rng, 0.5), bool(rng.integers(2))
    p = (1 - b1**t) * (np.sqrt(v / (1 - b2**t)) + eps)
    settings = {"lr": lr, "betas": (b1, b2), "eps": eps, "weight_decay": decay, "decoupled_weight_decay": decoupled}
    omega, c = (lr * decay, 0.0) if decoupled else (0.0, decay)
    recursion = Recursion(lr / p, use=(1, 0), keep=(b1, 0), add=(1 - b1, 0), omega=omega, c=c)
    return Drawn(recursion, optim.Adam, settings, {"exp_avg_sq": v / b2, "step": t - 1})


def nadam(rng: Rng) -> Drawn:
    lr, b1, b2, v, t = rate(rng), beta(rng), rng.uniform(0.5, 0.999), 10 ** rng.uniform(-4, 1), rng.integers(1, 2000)
    mu, after = (b1 * (1 - 0.5 * 0.96 ** (s * 0.004)) for s in (t, t + 1))
    before = rng.uniform(0, 1)  # the product of the momenta so far
    now, use = (1 - mu) / (1 - before * mu), after / (1 - before * mu * after)
    step = lr / (np.sqrt(v / (1 - b2**t)) + 1e-8)
    recursion = Recursion(step, now=now, use=(use, 0), keep=(b1, 0), add=(1 - b1, 0))
    state = {"exp_avg_sq": v / b2, "step": t - 1, "mu_product": before}
    return Drawn(recursion, optim.NAdam, {"lr": lr, "betas": (b1, b2)}, state)


def rmsprop(rng: Rng) -> Drawn:
    lr, mu, alpha, v, c = rate(rng), beta(rng), rng.uniform(0.5, 0.99), 10 ** rng.uniform(-4, 1), some(rng, 1.0)
    recursion = Recursion(lr / (np.sqrt(v) + 0.01), use=(1, 0), keep=(mu, 0), add=(1, 0), c=c)
    settings = {"lr": lr, "momentum": mu, "alpha": alpha, "eps": 0.01, "weight_decay": c}
    return Drawn(recursion, optim.RMSprop, settings, {"square_avg": v / alpha})


def without_average(rng: Rng) -> Drawn:
    lr, v, c, t = rate(rng), 10 ** rng.uniform(-4, 1), some(rng, 1.0), rng.integers(1, 50)
    settings = {"lr": lr, "weight_decay": c}
    if rng.integers(2):
        step = lr / (np.sqrt(v) + 1e-10) / (1 + (t - 1) * 0.1)
        return Drawn(
            Recursion(step, now=1, c=c), optim.Adagrad, {**settings, "lr_decay": 0.1}, {"sum": v, "step": t - 1}
        )
    delta, rho = 10 ** rng.uniform(-4, 1), rng.uniform(0.5, 0.99)
    step = lr * np.sqrt((delta + 1e-6) / (v + 1e-6))
    state = {"square_avg": v / rho, "acc_delta": delta}
    return Drawn(Recursion(step, now=1, c=c), optim.Adadelta, {**settings, "rho": rho}, state)


def two_averages(rng: Rng) -> Drawn:
    """AdEMAMix, quasi-hyperbolic momentum and schedule-free steps: the gradient and averages, as a user's reader."""
    lr, b1, b3, share, omega = rate(rng), beta(rng), beta(rng), rng.uniform(0, 1), some(rng, 0.9)
    alpha = float(rng.choice([0.0, 5.0]))
    recursion = Recursion(lr, now=1 - share, use=(share, alpha), keep=(b1, b3), add=(1 - b1, 1 - b3), omega=omega)
    gain = 1 - share + share * edge_gain(b1) + alpha * edge_gain(b3)
    return Drawn(recursion, scale=Scale(lr * gain / (1 - omega / 2)))


KINDS: tuple[Callable[[Rng], Drawn], ...] = (
    gradient_descent, averaged, adam, nadam, rmsprop, without_average, two_averages,
)  # fmt: skip


def hessian(rng: Rng) -> Array:
    """Positive definite three times of four, else with one to three negative eigenvalues; condition up to 1e3."""
    q, _ = np.linalg.qr(rng.standard_normal((D, D)))
    sizes = 10 ** rng.uniform(-2, 1, D)
    if not rng.integers(4):
        sizes[: rng.integers(1, D)] *= -1
    return (q * sizes) @ q.T


class Systems:
    """S random systems: A = H + diag c, what the readers say of them, and the recursion by coordinate."""

    def __init__(self, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        drawn = [[KINDS[rng.integers(len(KINDS))](rng) for _ in range(D)] for _ in range(count)]
        a_SDD = np.array([hessian(rng) for _ in range(count)])
        c_SD = np.array([[one.recursion.c for one in row] for row in drawn])
        scales = [[one.read() for one in row] for row in drawn]
        self.scale_SD = np.array([[float(s.step_size) for s in row] for row in scales])
        assert np.allclose([[float(s.decay) for s in row] for row in scales], c_SD)
        self.a_SDD = a_SDD + c_SD[:, :, None] * np.eye(D)
        self.drawn = [[one.recursion for one in row] for row in drawn]
        self.rho_S = self.spectra(self.scale_SD)[:, -1] / 2

    def spectra(self, scale_SD: Array) -> Array:
        root_SD = np.sqrt(scale_SD)
        return np.linalg.eigvalsh(root_SD[:, :, None] * self.a_SDD * root_SD[:, None, :])

    def of(self, name: str, k: int | None = None) -> Array:
        """(S, D): one number of the recursions."""
        values = ([getattr(one, name) for one in row] for row in self.drawn)
        return np.array([[v if k is None else v[k] for v in row] for row in values], dtype=float)

    def modes(self, rho: float) -> Array:
        """(S, 3 D): eigenvalues of the companion matrix, A scaled so that the system has this rho."""
        a_SDD = self.a_SDD * (rho / self.rho_S)[:, None, None]
        eye, step = np.eye(D), self.of("step")[:, :, None]
        m = np.zeros((len(a_SDD), 3 * D, 3 * D))
        m[:, :D, :D] = (1 - self.of("omega"))[:, :, None] * eye - (step * self.of("now")[:, :, None]) * a_SDD
        for k in (0, 1):
            rows, use = slice((k + 1) * D, (k + 2) * D), self.of("use", k)[:, :, None]
            added, kept = self.of("add", k)[:, :, None] * a_SDD, self.of("keep", k)[:, :, None] * eye
            m[:, rows, :D], m[:, rows, rows] = added, kept
            m[:, :D, :D] -= step * use * added
            m[:, :D, rows] = -step * use * kept
        return np.linalg.eigvals(m)

    def escaping(self, rho: float) -> Array:
        """(S,): modes that negative curvature lets grow without alternating: A + G(1) has as many negative
        eigenvalues, G(1) = omega / (step F(1))."""
        gain = self.of("now") + sum(self.of("use", k) * self.of("add", k) / (1 - self.of("keep", k)) for k in (0, 1))
        held = (self.of("omega") / (self.of("step") * gain))[:, :, None] * np.eye(D)
        return (np.linalg.eigvalsh(self.a_SDD * (rho / self.rho_S)[:, None, None] + held) < 0).sum(1)


@pytest.fixture(scope="module")
def systems() -> Systems:
    return Systems(SYSTEMS, 0)


def growing(modes_SM: Array) -> Array:
    return (np.abs(modes_SM) > 1).sum(1)


def test_positive_definite_systems_are_stable_exactly_below_one(systems: Systems) -> None:
    definite_S = np.linalg.eigvalsh(systems.a_SDD)[:, 0] > 0
    assert definite_S.sum() > 2000
    assert (growing(systems.modes(0.999))[definite_S] == 0).all()
    assert (growing(systems.modes(1.001))[definite_S] > 0).all()


def test_negative_curvature_grows_apart_from_the_edge(systems: Systems) -> None:
    """In every system exactly one mode more grows above rho = 1 than below it."""
    indefinite_S = (np.linalg.eigvalsh(systems.a_SDD)[:, 0] < 0) & (systems.rho_S > 0)
    assert indefinite_S.sum() > 500
    for rho, more in ((0.999, 0), (1.001, 1)):
        found_S = growing(systems.modes(rho)) - systems.escaping(rho)
        assert (found_S[indefinite_S] == more).all()


@pytest.mark.parametrize("wrong", ["gain", "omega"])
def test_a_wrong_reader_is_seen(systems: Systems, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were D without its filter, or without its decay, the same counts would be off in hundreds of systems."""
    factor = 1 - systems.of("omega") / 2 if wrong == "omega" else 1 + systems.of("keep", 0)
    monkeypatch.setattr(systems, "rho_S", systems.spectra(systems.scale_SD * factor)[:, -1] / 2)
    definite_S = np.linalg.eigvalsh(systems.a_SDD)[:, 0] > 0
    unstable_below_S, stable_above_S = growing(systems.modes(0.999)) > 0, growing(systems.modes(1.001)) == 0
    assert ((unstable_below_S | stable_above_S) & definite_S).sum() > 300
