"""R01 to R04: gradient descent at the edge of stability, and below it.

The net is tanh 20-48-48-5 on 200 examples with half the squared error, full batch. Labels are those of a linear
teacher, a fifth of them drawn afresh; the control keeps them clean and halves the learning rate.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from claim import Check, Claim, near
from torch import Tensor, nn, optim
from training import Plan, half_squared_errors, network, number, sharpness_now, teacher_data, watch

from cockpit_bench import Cockpit
from instruments.curvature.preconditioned_sharpness import PreconditionedSharpness

HEAVY: dict[str, Any] = {"momentum": 0.9}
EDGES: tuple[tuple[str, float, dict[str, Any]], ...] = (
    ("gradient descent", 2.0, {}),
    ("heavy ball 0.9", 3.8, HEAVY),
    ("Nesterov 0.9", 3.8 / 2.8, HEAVY | {"nesterov": True}),
    ("momentum as EMA, 0.9", 38.0, HEAVY | {"dampening": 0.9}),
)
EVERY, HIT, AFTER = 10, 0.97, 1000
LONG, CONTROL = 2000, 5000


def parabola(call: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    return 0.5 * call(batch).square().sum(1)


def edge(settings: dict[str, Any], steps: int = 2000) -> float:
    """The largest eta at which 1/2 x^2 does not grow, by bisection to 0.05 %."""
    low, high = 0.1, 100.0
    while high / low > 1.0005:
        lr, x = (low * high) ** 0.5, torch.ones(1, dtype=torch.float64)
        optimizer = optim.SGD([x], lr=lr, foreach=False, **settings)
        for _ in range(steps):
            x.grad = x.clone()
            optimizer.step()
        low, high = (lr, high) if abs(float(x)) < 1 else (low, lr)
    return low


def rho_on_parabola(lr: float, settings: dict[str, Any]) -> float:
    """What the instrument reads there with this optimizer; a parameter without a gradient would not be stepped."""
    model, batch = nn.Linear(1, 1, bias=False).double(), torch.ones(1, 1, dtype=torch.float64)
    optimizer = optim.SGD(model.parameters(), lr=lr, **settings)
    with Cockpit(model, optimizer, loss=parabola, panel=None, sinks=[], strict=True) as cockpit:
        torch.autograd.backward([parabola(model, batch).mean()])
        return number(cockpit.read(PreconditionedSharpness(tol=1e-6), batch), "rho")


def thresholds(seeds: Sequence[int], steps: int = 2000) -> list[Check]:
    """Exact, so that seeds have no say."""
    checks = []
    for name, expected, settings in EDGES:
        found = edge(settings, steps)
        checks.append(Check("stable up to eta lambda", name, [found], **near(expected, 0.003 * expected)))
        checks.append(Check("rho read there", name, [rho_on_parabola(found, settings)], **near(1.0, 0.003)))
    return checks


@cache
def descend(seed: int, noise: float, below: float, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Steps and values of rho = eta lambda_1 / 2, and the loss of every step, at eta = below * 2 / lambda_1(0)."""
    torch.manual_seed(seed)
    data, model = teacher_data(200, noise), network("tanh", 48)
    lr = below * 2 / sharpness_now(model, half_squared_errors, data)
    plan = Plan(steps, instruments={"rho": (PreconditionedSharpness(tol=0.01), EVERY)})
    run = watch(model, optim.SGD(model.parameters(), lr=lr), half_squared_errors, data, plan)
    return (*run.series("rho", "rho"), torch.tensor(run.losses, dtype=torch.float64))


def hit_of(steps: Tensor, rho: Tensor) -> int:
    """The first step at which rho was read at 0.97 or more; -1 without one."""
    there = (rho >= HIT).nonzero()
    return int(steps[there[0, 0]]) if len(there) else -1


def hovering(seeds: Sequence[int]) -> list[Check]:
    hits, means, sds = [], [], []
    for seed in seeds:
        steps, rho, _ = descend(seed, 0.2, 0.6, LONG)
        hit = hit_of(steps, rho)
        after = rho[(steps > hit) & (steps <= hit + AFTER)] if hit >= 0 else rho.new_full((2,), torch.nan)
        hits.append(float(hit))
        means.append(float(after.mean()))
        sds.append(float(after.std()))
    setting = "20% label noise, eta = 0.6 x 2/lambda(0)"
    return [
        Check("first step with rho >= 0.97", setting, hits, "100 to 600", 100, 600),
        Check("mean rho in the 1000 steps after", setting, means, **near(1.0, 0.03)),
        Check("its standard deviation", setting, sds, "0.04 or less", high=0.04),
    ]


def control(seeds: Sequence[int], steps: int = CONTROL) -> list[Check]:
    runs = [descend(seed, 0.0, 0.3, steps) for seed in seeds]
    setting = f"clean labels, eta = 0.3 x 2/lambda(0), {steps} steps"
    return [
        Check("largest rho", setting, [float(rho.max()) for _, rho, _ in runs], "below 0.97", high=HIT),
        Check("last loss / first", setting, [float(loss[-1] / loss[0]) for *_, loss in runs], "towards 0", high=1e-2),
    ]


def ragged_fall(seeds: Sequence[int]) -> list[Check]:
    """R02's runs from the hit on; without a hit there is nothing to see, and nan says so."""
    rising, falls = [], []
    for seed in seeds:
        steps, rho, losses = descend(seed, 0.2, 0.6, LONG)
        hit = hit_of(steps, rho)
        part = losses[hit : hit + AFTER + 1] if hit >= 0 else losses.new_full((2,), torch.nan)
        rising.append(float((part[1:] > part[:-1]).double().mean()) if hit >= 0 else float("nan"))
        falls.append(float(part[-1] / part[0]))
    setting = "R02 in the 1000 steps after its hit"
    return [
        Check("share of steps at which the loss rises", setting, rising, "0.02 to 0.11", 0.02, 0.11),
        Check("loss at the end / at the hit", setting, falls, "0.1 or less", high=0.1),
    ]


COHEN = "Cohen et al. 2021, Gradient descent on neural networks typically occurs at the edge of stability"
CLAIMS = {
    "R01": Claim("edges of SGD with and without momentum", f"{COHEN}; Cohen et al. 2022", thresholds),
    "R02": Claim("sharpness rises, then hovers just above 2/eta", COHEN, hovering),
    "R03": Claim("control: an easy problem at a small rate stays below", COHEN, control),
    "R04": Claim("at the edge the loss rises at single steps and yet falls", COHEN, ragged_fall),
}
