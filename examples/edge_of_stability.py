"""Gradient descent at its edge: where that is for four optimizers, and that training comes to hover at it.

    python examples/edge_of_stability.py --seed 0

Cohen et al. 2021, "Gradient descent on neural networks typically occurs at the edge of stability". First by bisection
on a parabola; then full-batch training from below the edge: sharpness rises until eta lambda / 2 = 1, and stays there.
"""

import argparse
from typing import Any

import torch
from torch import nn, optim

from cockpit_bench import Cockpit, batches
from instruments.curvature.preconditioned_sharpness import PreconditionedSharpness
from instruments.curvature.sharpness import Sharpness

HEAVY: dict[str, Any] = {"momentum": 0.9}
EDGES = ((2.0, {}), (3.8, HEAVY), (3.8 / 2.8, {**HEAVY, "nesterov": True}), (38.0, {**HEAVY, "dampening": 0.9}))
STEPS, SMOKE_STEPS, EVERY, SHARP = 2000, 60, 10, PreconditionedSharpness(tol=0.01)


def edge(settings: dict[str, Any], steps: int) -> float:
    low, high = 0.1, 100.0
    while high / low > 1.0005:
        lr, x = (low * high) ** 0.5, torch.ones(1, dtype=torch.float64)
        optimizer = optim.SGD([x], lr=lr, foreach=False, **settings)
        for _ in range(steps):
            x.grad = x.clone()
            optimizer.step()
        low, high = (lr, high) if abs(float(x)) < 1 else (low, lr)
    return low


def train(seed: int, steps: int) -> list[float]:
    """eta lambda / 2 at every tenth step; a fifth of the labels is noise, to be learnt by heart."""
    torch.manual_seed(seed)
    x = torch.randn(200, 20)
    labels = torch.where(torch.rand(200) < 0.2, torch.randint(5, (200,)), (x @ torch.randn(20, 5)).argmax(1))
    batch = x, nn.functional.one_hot(labels, 5).float()
    model = nn.Sequential(nn.Linear(20, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 5))
    optimizer, loss_fn, readings = optim.SGD(model.parameters(), lr=1.0), nn.MSELoss(), []
    how = {"probe": batches(batch), "panel": None, "budget": None, "sinks": []}
    with Cockpit(model, optimizer, loss=loss_fn, instruments={"rho": (SHARP, EVERY)}, **how) as cockpit:
        first = cockpit.read(Sharpness(tol=1e-3), batch).values["sharpness"]
        optimizer.param_groups[0]["lr"] = 0.6 * 2 / first
        for step in range(steps):
            loss = loss_fn(model(x), batch[1])
            loss.backward()
            cockpit.observe(batch, loss)
            optimizer.step()
            optimizer.zero_grad()
            if step % EVERY == 0:
                readings.append(float(cockpit.last["rho"]["rho"]))
            if step % (steps // 6) == 0:
                print(f"step {step:4d}: eta lambda / 2 = {readings[-1]:.3f}, loss {float(loss.detach()):.4f}")
    return readings


def main() -> int:
    options = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--smoke", action="store_true", help=f"{SMOKE_STEPS} steps of training: too few to get there")
    given = options.parse_args()
    torch.set_num_threads(1)
    passed = True
    for expected, settings in EDGES:
        found = edge(settings, 200 if given.smoke else 2000)
        passed &= abs(found / expected - 1) <= 0.003
        print(f"stable up to eta = {found:6.3f} / curvature, expected {expected:6.3f} for {settings}")
    readings = train(given.seed, SMOKE_STEPS if given.smoke else STEPS)
    mean = sum(readings[len(readings) // 2 :]) / (len(readings) - len(readings) // 2)
    print(f"mean of eta lambda / 2 over the last half {mean:.3f}, expected 1 ± 0.03 after {STEPS} steps")
    return int(not (given.smoke or (passed and abs(mean - 1) <= 0.03)))


if __name__ == "__main__":
    raise SystemExit(main())
