"""R16: batch normalisation takes away the outliers of the Hessian, and the gradient out of their space.

A ReLU CNN 1-8-16-16 on 512 of scikit-learn's digits (standardised as a whole), K = 10 classes, cross entropy, SGD at
0.1 with batches of 64, 200 steps. Curvature and gradient are those of all 512 examples in training mode, so that batch
normalisation uses the statistics of this batch; in eval mode it would use the population's. The paper has no numbers
for a net of this size: the tolerances are the third attempt, after seeds 0 to 14 had been seen. Single readings
scatter, since the gradient oscillates. In eval mode the eleventh eigenvalue may be negative: then the ratio is
infinite.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from claim import Check, Claim
from sklearn.datasets import load_digits
from torch import nn, optim
from training import Batch, Plan, cross_entropies, number, watch

from cockpit_bench import Cockpit, ProbeSettings
from instruments.curvature.outliers import Outliers
from instruments.running import Mode

CLASSES, STEPS, EVERY = 10, 200, 20
READING = Outliers(k=CLASSES, max_products=100)


def images(n: int) -> Batch:
    """n digits chosen at random, all pixels together at mean 0 and variance 1."""
    x, y = load_digits(return_X_y=True)
    images = torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8)
    rows = torch.randperm(len(images))[:n]
    return ((images - images.mean()) / images.std())[rows], torch.tensor(y)[rows]


def cnn(normalised: bool) -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        norm = [nn.BatchNorm2d(outputs)] if normalised else []
        return [nn.Conv2d(inputs, outputs, 3, padding=1), *norm, nn.ReLU()]

    return nn.Sequential(
        *block(1, 8), *block(8, 16), nn.MaxPool2d(2), *block(16, 16), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64, CLASSES),
    )  # fmt: skip


@dataclass(frozen=True)
class Spectrum:
    """lambda_1 / lambda_(K+1), and the share of the squared gradient along the K largest, at one moment."""

    loss: float
    ratio: float
    concentration: float


@cache
def train(seed: int, normalised: bool) -> tuple[tuple[Spectrum, ...], float]:
    """Spectra along the run and, last, at its end; and the ratio at the end in eval mode."""
    torch.manual_seed(seed)
    data, model = images(512), cnn(normalised)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    plan = Plan(STEPS, batch_size=64, instruments={"top": (READING, EVERY)})
    run = watch(model, optimizer, cross_entropies, data, plan)
    ratios, shares = (run.series("top", name)[1].tolist() for name in ("outlier_ratio", "concentration"))
    before = [max(0, step - 8) for step in range(0, STEPS, EVERY)]
    levels = [statistics.fmean(run.losses[start : start + 8]) for start in before]
    end, population = (read(model, optimizer, data, mode) for mode in ("train", "eval"))
    last = Spectrum(statistics.fmean(run.losses[-8:]), end["ratio"], end["concentration"])
    along = (Spectrum(*row) for row in zip(levels, ratios, shares, strict=True))
    return (*along, last), population["ratio"]


def read(model: nn.Module, optimizer: optim.Optimizer, data: Batch, mode: Mode) -> dict[str, float]:
    """One reading in this mode; it must have converged, or the smaller eigenvalues are too low."""
    how: dict[str, Any] = {"panel": None, "sinks": [], "strict": True, "settings": ProbeSettings(mode=mode)}
    with Cockpit(model, optimizer, loss=cross_entropies, **how) as cockpit:
        reading = cockpit.read(READING, data)
    if not number(reading, "converged"):
        raise RuntimeError(f"expected {CLASSES + 1} converged eigenvalues, got {reading}")
    first, after = number(reading, "eigenvalue_1"), number(reading, "next")
    return {"ratio": first / after if after > 0 else math.inf, "concentration": number(reading, "concentration")}


def outliers(seeds: Sequence[int]) -> list[Check]:
    """With and without at the same step, and at the same loss: batch normalisation also trains faster."""
    plain = [train(seed, False)[0] for seed in seeds]
    normal, population = zip(*(train(seed, True) for seed in seeds), strict=True)
    top, gap, share = f"lambda_1 / lambda_{CLASSES + 1}", "plain over BN", "gradient in the top 10: plain less BN"
    after, equal = f"after {STEPS} steps", "at equal loss"
    ends = list(zip([a[-1] for a in plain], [b[-1] for b in normal], strict=True))
    pairs = [(a, nearest(spectra, a.loss)) for (a, _), spectra in zip(ends, normal, strict=True)]
    back = [ratio / b.ratio for ratio, (_, b) in zip(population, ends, strict=True)]
    return [
        Check(top, f"plain, {after}", [a.ratio for a, _ in ends], "8 or more", low=8.0, of="median"),
        Check(top, f"with BN, {after}", [b.ratio for _, b in ends], "8 or less", high=8.0),
        Check(f"{top}, {gap}", after, [a.ratio / b.ratio for a, b in ends], "2 or more", low=2.0, of="median"),
        Check(f"{top}, {gap}", equal, [a.ratio / b.ratio for a, b in pairs], "2 or more", low=2.0),
        Check("gradient in the top 10", f"plain, {after}", [a.concentration for a, _ in ends], "above 0.4", low=0.4),
        Check(share, after, [a.concentration - b.concentration for a, b in ends], "above 0", low=0.0),
        Check(share, equal, [a.concentration - b.concentration for a, b in pairs], "above 0", low=0.0, of="median"),
        Check(f"{top}, BN in eval over train mode", after, back, "2 or more: outliers are back", low=2.0),
    ]


def nearest(spectra: Sequence[Spectrum], loss: float) -> Spectrum:
    return min(spectra, key=lambda spectrum: abs(spectrum.loss - loss))


CLAIMS = {
    "R16": Claim(
        "batch normalisation suppresses outliers, and the gradient leaves their space",
        "Ghorbani et al. 2019, An investigation into neural net optimization via Hessian eigenvalue density",
        outliers,
        seeds=5,
    )
}
