"""Full-batch Adam trains at the edge of stability: rho, the preconditioned sharpness, comes to hover at 1.

    python examples/adaptive_edge_of_stability.py --seed 0

Cohen et al. 2022, "Adaptive gradient methods at the edge of stability". Three learning rates, the
largest ten times the smallest, end at the same pure number: rho is curvature in units of what the optimizer can bear.
Lanczos approaches from below and the default tolerance is made for a cheap panel, so the readings here are tighter.
"""

import argparse
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from cockpit_bench import Cockpit, Reading, batches
from instruments.curvature.preconditioned_sharpness import PreconditionedSharpness

STEPS = {1e-4: 3000, 3e-4: 2000, 1e-3: 2000}
SMOKE_STEPS = 60
TOLERANCE = 0.05


def data(examples: int) -> tuple[Tensor, Tensor]:
    """Digits with every pixel at mean 0 and variance 1, and one-hot labels."""
    bunch = load_digits()
    x = torch.tensor(bunch.data[:examples], dtype=torch.float32)
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-6)
    return x, nn.functional.one_hot(torch.tensor(bunch.target[:examples]), 10).float()


def losses(call: Callable[..., Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """Half the squared error of each example."""
    x, y = batch
    return 0.5 * (call(x) - y).square().sum(1)


def train(lr: float, steps: int, seed: int, logdir: str | None) -> list[float]:
    """rho at every 50th step."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 100), nn.Tanh(), nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.99))
    batch = data(1000)
    with Cockpit(
        model, optimizer, loss=losses, panel=None, probe=batches(batch), budget=None, steps=steps, sinks=[],
        instruments={"curvature/preconditioned_sharpness": (PreconditionedSharpness(tol=0.01), 50)},
        logdir=None if logdir is None else f"{logdir}/lr{lr:g}-seed{seed}",
    ) as cockpit:  # fmt: skip
        for _ in range(steps):
            loss = losses(model, batch).mean()
            loss.backward()
            cockpit.observe(batch, loss)
            optimizer.step()
            optimizer.zero_grad()
        return [float(r.values["rho"]) for r in cockpit.records if isinstance(r, Reading) and r.status == "ok"]


def main() -> int:
    options = argparse.ArgumentParser(description="rho of full-batch Adam at three learning rates")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--smoke", action="store_true", help=f"{SMOKE_STEPS} steps a run: too few to reach the edge")
    options.add_argument("--logdir", help="keep the run folders here")
    given = options.parse_args()
    torch.set_num_threads(1)
    print(f"learning rate   readings   mean rho over the last half, expected 1 ± {TOLERANCE}")
    failed = False
    for lr, steps in STEPS.items():
        rho = train(lr, SMOKE_STEPS if given.smoke else steps, given.seed, given.logdir)
        last_half = rho[len(rho) // 2 :]
        mean = sum(last_half) / len(last_half)
        passed = abs(mean - 1) <= TOLERANCE
        failed = failed or not passed
        verdict = "too short to tell" if given.smoke else "pass" if passed else "FAIL"
        print(f"{lr:13g}   {len(rho):8d}   {mean:.3f}   {verdict}", flush=True)
    return int(failed and not given.smoke)


if __name__ == "__main__":
    raise SystemExit(main())
