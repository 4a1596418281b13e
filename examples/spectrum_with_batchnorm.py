"""The spectrum of the Hessian of a small CNN with and without batch normalisation, and where the gradient lies in it.

    python examples/spectrum_with_batchnorm.py --seed 0 --picture spectra.png

Ghorbani et al. 2019, "An investigation into neural net optimization via Hessian eigenvalue density": without batch
normalisation a few eigenvalues, about one a class, stand far off the bulk, and they hold nearly all of the gradient.
With it they come closer and so hold less. Read in training mode: batch normalisation must use the statistics of the
batch; with those of the population (mode="eval") the outliers are back, and the last column shows them.
"""

import argparse
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn, optim

from cockpit_bench import Cockpit, ProbeSettings
from instruments.curvature.density import SpectralDensity
from instruments.curvature.outliers import Outliers

CLASSES, STEPS, SMOKE_STEPS = 10, 200, 10


def cnn(normalised: bool) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 8), (8, 16)):
        norm = nn.BatchNorm2d(outputs) if normalised else nn.Identity()
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, CLASSES))


def train(model: nn.Module, data: tuple[Tensor, Tensor], steps: int) -> float:
    """SGD with batches of 64; the loss on all data afterwards."""
    optimizer, loss_fn = optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss()
    for _ in range(steps):
        rows = torch.randint(len(data[0]), (64,))
        optimizer.zero_grad()
        loss_fn(model(data[0][rows]), data[1][rows]).backward()
        optimizer.step()
    return float(loss_fn(model(data[0]), data[1]).detach())


def read(model: nn.Module, data: Any, instrument: Any, mode: Any = "train") -> Any:
    how: dict[str, Any] = {"panel": None, "sinks": [], "strict": True, "settings": ProbeSettings(mode=mode)}
    with Cockpit(model, optim.SGD(model.parameters(), lr=0.1), loss=nn.CrossEntropyLoss(), **how) as cockpit:
        return cockpit.read(instrument, data).values


def draw(densities: dict[str, Any], path: str) -> None:
    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    for name, (grid_K, density_K) in densities.items():
        axes.plot(grid_K, np.where(density_K > 1e-6, density_K, np.nan), label=name)
    axes.set(yscale="log", xlabel="eigenvalue of the Hessian", ylabel="density")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    options = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--picture", help="draw both densities into this file")
    options.add_argument("--smoke", action="store_true", help=f"{SMOKE_STEPS} steps: nothing stands out yet")
    given = options.parse_args()
    torch.set_num_threads(1)
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    examples, steps, products = (64, SMOKE_STEPS, 30) if given.smoke else (512, STEPS, 120)
    data = ((x - x.mean()) / x.std()).float().reshape(-1, 1, 8, 8)[:examples], y[:examples]
    top, spread = Outliers(k=CLASSES, max_products=products), SpectralDensity(probes=4, steps=products // 2)
    ratios, densities = {}, {}
    print("                      loss  largest / 11th  gradient in the top 10  the ratio in eval mode")
    for name in ("plain", "batch normalisation"):
        torch.manual_seed(given.seed)
        model = cnn(normalised=name != "plain")
        loss = train(model, data, steps)
        found, population = read(model, data, top), read(model, data, top, "eval")["outlier_ratio"]
        ratios[name] = found["outlier_ratio"]
        print(f"{name:20}{loss:6.3f}{ratios[name]:16.1f}{found['concentration']:24.2f}{population:24.1f}")
        densities[name] = read(model, data, spread)["density"] if given.picture else None
    if given.picture:
        draw(densities, given.picture)
    times = ratios["plain"] / ratios["batch normalisation"]
    print(f"outliers stand {times:.1f} times further off without batch normalisation; expected at least 2 times")
    return int(times < 2 and not given.smoke)


if __name__ == "__main__":
    raise SystemExit(main())
