"""R05 and R06: full-batch Adam at its own edge, and far beyond it in its first steps.

tanh 20-64-64-5 on 256 examples of a linear teacher, Adam (0.9, 0.99). rho is lambda_1 of the preconditioned Hessian
times eta over 38, Adam's second moment taken after the step's own gradient and with the bias corrections.
"""

from collections.abc import Sequence
from functools import cache

import torch
from claim import Check, Claim, near
from torch import Tensor, optim
from training import Plan, cross_entropies, half_squared_errors, network, teacher_data, watch

from cockpit_bench import at
from cockpit_bench.cadence import Cadence, every
from instruments.curvature.preconditioned_sharpness import PreconditionedSharpness

SECOND_HALF = {1e-3: 0.99, 3e-3: 1.00, 1e-2: 1.01}
STEPS, EVERY = 4000, 40
FIRST = {1e-3: (2.6, 0.07, 0.03), 1e-2: (26.0, 0.39, 0.13)}
TIMES = (1, 2, 5)


@cache
def adam(seed: int, lr: float, cross_entropy: bool, steps: int, cadence: Cadence, tol: float = 0.01) -> Tensor:
    """rho at the steps of the cadence; 20 % label noise under the squared error, 10 % under cross entropy."""
    torch.manual_seed(seed)
    data, model = teacher_data(256, 0.1 if cross_entropy else 0.2), network("tanh", 64)
    losses = cross_entropies if cross_entropy else half_squared_errors
    optimizer = optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.99))
    plan = Plan(steps, instruments={"rho": (PreconditionedSharpness(tol=tol), cadence)})
    return watch(model, optimizer, losses, data, plan).series("rho", "rho")[1]


def at_the_edge(seeds: Sequence[int]) -> list[Check]:
    checks = []
    for lr, expected in SECOND_HALF.items():
        runs = [adam(seed, lr, False, STEPS, every(EVERY)) for seed in seeds]
        means = [float(rho[len(rho) // 2 :].mean()) for rho in runs]
        checks.append(Check("mean rho, second half", f"MSE, eta {lr:g}", means, **near(expected, 0.04), of="mean"))
    return checks


def first_steps(seeds: Sequence[int]) -> list[Check]:
    """t counts from 1: the step about to be taken. The few coordinates with the smallest gradient decide at t = 1."""
    cadence, checks = at(*(t - 1 for t in TIMES)), []
    rho = {lr: [adam(seed, lr, True, TIMES[-1], cadence, 1e-3) for seed in seeds] for lr in FIRST}
    for lr, expectations in FIRST.items():
        for place, (t, expected) in enumerate(zip(TIMES, expectations, strict=True)):
            values = [float(run[place]) for run in rho[lr]]
            bounds = near(expected, 0.3 * expected)
            checks.append(Check(f"rho at t = {t}", f"CE, eta {lr:g}", values, **bounds, of="median"))
    slopes = [float(high[0] / low[0]) for low, high in zip(rho[1e-3], rho[1e-2], strict=True)]
    checks.append(Check("rho at t = 1, eta 1e-2 over 1e-3", "CE", slopes, **near(10.0, 0.1)))
    drops = [max(float(run[1] / run[0]) for run in runs) for runs in zip(rho[1e-3], rho[1e-2], strict=True)]
    checks.append(Check("rho at t = 2 over t = 1", "CE, the larger of both eta", drops, "far below 1", high=0.3))
    return checks


CLAIMS = {
    "R05": Claim(
        "full-batch Adam hovers at 38/eta",
        "Cohen et al. 2022, Adaptive gradient methods at the edge of stability",
        at_the_edge,
    ),
    "R06": Claim(
        "the first steps of Adam are super-critical",
        "Kalra and Barkeshli 2024, Why warmup the learning rate?; Cohen et al. 2022",
        first_steps,
        seeds=9,
    ),
}
