"""What each engine of the curvature's diagonal knows of an MLP on scikit-learn's digits, before and after training.

    python tests/benchmarks/diagonal_engines.py

For each width and number of epochs: tic_diagonal and the trace with their standard errors by BackPACK (exact), drawn
targets, random signs and BackPACK's drawn targets, and the time of a reading in g, one gradient on the 512 held digits.
"""

import time

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from instruments import Probe, View
from instruments.curvature.tic import Tic
from instruments.held import HeldBatches
from instruments.objective import as_objective

LOSS = nn.CrossEntropyLoss()
ENGINES = ("backpack", "drawn", "probes", "backpack_mc")
Rows = list[tuple[Tensor, Tensor]]


def trained(width: int, epochs: int, x: Tensor, y: Tensor) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            LOSS(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
    optimizer.zero_grad()
    return model


def one_gradient(model: nn.Module, held: Rows) -> float:
    """Seconds."""
    start = time.perf_counter()
    for x, y in held:
        torch.autograd.grad(LOSS(model(x), y), list(model.parameters()))
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    step: Rows = [(x[:128], y[:128])]
    held: Rows = [(x[k : k + 64], y[k : k + 64]) for k in range(200, 712, 64)]
    for width, epochs in ((128, 0), (128, 20), (512, 0), (512, 20)):
        model = trained(width, epochs, x, y)
        g = min(one_gradient(model, held) for _ in range(3))
        loss = float(LOSS(model(x), y).detach())
        print(f"{sum(p.numel() for p in model.parameters())} parameters, {epochs} epochs, loss {loss:.3g}")
        for engine in ENGINES:
            instrument = Tic(engine=engine)  # type: ignore[arg-type]
            with Probe(model, as_objective(LOSS), [], step, step=1, held=HeldBatches(held)) as probe:
                start = time.perf_counter()
                found = instrument.read(View(probe, instrument.needs))
                seconds = time.perf_counter() - start
            names = ("tic_diagonal", "trace_of_curvature")
            parts = [f"{name} {float(found[name].value):.4g} ± {float(found[name].stderr):.2g}" for name in names]
            print(f"  {engine:12} {', '.join(parts)}, floored {float(found['floored']):.1%}, {seconds / g:.0f} g")


if __name__ == "__main__":
    main()
