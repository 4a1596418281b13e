"""R07 and R08: mini-batch SGD stays below the edge of gradient descent, while its own batches see more curvature.

The net of R02 on random labels whose one-hot targets are three times as large, so that there is something to learn by
heart (with targets of 1 the plateaus are half as high and R07 misses); every epoch is shuffled, its last batch is what
is left. The plateau is the mean over the second half of the run. Batch sharpness is the mean of the ratios over 50
readings, four steps apart; its peak comes before interpolation, after which no gradient is left.
"""

from collections.abc import Sequence
from functools import cache, partial

import torch
from claim import Check, Claim, near
from torch import optim
from training import Plan, Watched, half_squared_errors, network, teacher_data, watch

from instruments.curvature.batch_sharpness import BatchSharpness
from instruments.curvature.preconditioned_sharpness import PreconditionedSharpness

STEPS, EVERY, POOL = 5000, 4, 50
PLATEAUS = {(0.1, 50): 0.86, (0.1, 16): 0.56, (0.05, 16): 0.40, (0.05, 8): 0.30}
PEAKS = {(0.1, 16): "0.87 over 0.55", (0.05, 8): "0.74 over 0.30", (0.05, 4): "0.69 over 0.17"}
tripled_errors = partial(half_squared_errors, scale=3.0)


@cache
def stochastic(seed: int, lr: float, batch_size: int, steps: int = STEPS) -> Watched:
    torch.manual_seed(seed)
    data, model = teacher_data(200, noise=1.0), network("tanh", 48)
    readings = {
        "rho": (PreconditionedSharpness(tol=0.01), 10 * EVERY),
        "batch": (BatchSharpness(pool=POOL), EVERY),
    }
    plan = Plan(steps, batch_size, instruments=readings)
    return watch(model, optim.SGD(model.parameters(), lr=lr), tripled_errors, data, plan)


def plateau(run: Watched) -> float:
    rho = run.series("rho", "rho")[1]
    return float(rho[len(rho) // 2 :].mean())


def peak(run: Watched, lr: float) -> tuple[float, float]:
    """The largest batch sharpness over a full pool, and eta lambda_1 / 2 at its step, both times eta / 2."""
    steps, pooled = run.series("batch", "batch_sharpness")
    full = pooled[POOL:].nan_to_num(nan=0.0)
    place = int(full.argmax())
    rho_steps, rho = run.series("rho", "rho")
    nearest = int((rho_steps - steps[POOL + place]).abs().argmin())
    return float(full[place]) * lr / 2, float(rho[nearest])


def below_the_edge(seeds: Sequence[int]) -> list[Check]:
    plateaus = {key: [plateau(stochastic(seed, *key)) for seed in seeds] for key in PLATEAUS}
    checks = [
        Check("plateau of eta lambda / 2", f"eta {lr:g}, B {size}", plateaus[lr, size], **near(value, 0.08), of="mean")
        for (lr, size), value in PLATEAUS.items()
    ]
    for lr, large, small in ((0.1, 50, 16), (0.05, 16, 8)):
        gaps = [a - b for a, b in zip(plateaus[lr, large], plateaus[lr, small], strict=True)]
        checks.append(Check(f"plateau at B {large} less that at {small}", f"eta {lr:g}", gaps, "above 0", low=0.0))
    return checks


def batches_see_more(seeds: Sequence[int]) -> list[Check]:
    checks = []
    for (lr, size), listed in PEAKS.items():
        peaks = [peak(stochastic(seed, lr, size), lr) for seed in seeds]
        setting = f"eta {lr:g}, B {size}"
        tops = [batch for batch, _ in peaks]
        checks.append(Check("peak batch sharpness x eta/2", setting, tops, f"{listed}; at most 1.1", high=1.1))
        ratios = [batch / whole for batch, whole in peaks]
        checks.append(Check("over eta lambda / 2 at that step", setting, ratios, "above 1.3", low=1.3))
    return checks


ANDREYEV = "Andreyev and Beneventano 2024, Edge of stochastic stability"
CLAIMS = {
    "R07": Claim("SGD keeps lambda below 2/eta, more so with small batches", ANDREYEV, below_the_edge),
    "R08": Claim("batch sharpness nears 2/eta while lambda is lower", ANDREYEV, batches_see_more),
}
