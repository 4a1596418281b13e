"""Mini-batch SGD below the edge of gradient descent, and the batch sharpness that is nearer to it.

    python examples/edge_of_stochastic_stability.py --seed 0

Andreyev and Beneventano 2024, "Edge of stochastic stability". The smaller the batch, the flatter the place where SGD
comes to rest: the sharpness of the whole loss stays below 2/eta. What nears 2/eta is the curvature that batches see
along their own gradients, until everything is learnt by heart and no gradient is left. Both are in units of 2/eta.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn, optim

from cockpit_bench import Cockpit, batches
from instruments.curvature.batch_sharpness import BatchSharpness
from instruments.curvature.preconditioned_sharpness import PreconditionedSharpness

LR, SIZES, STEPS, SMOKE_STEPS, EVERY, POOL = 0.05, (32, 8, 4), 4000, 80, 4, 50


def losses(call: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """Half the squared error of each example; targets of 3 take more learning by heart than targets of 1."""
    return 0.5 * (call(batch[0]) - 3 * nn.functional.one_hot(batch[1], 5)).square().sum(1)


def train(seed: int, size: int, steps: int) -> tuple[float, float]:
    """lambda eta / 2 where batch sharpness is at its peak, and that peak, also times eta / 2."""
    torch.manual_seed(seed)
    x, labels = torch.randn(200, 20), torch.randint(5, (200,))
    model = nn.Sequential(nn.Linear(20, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 5))
    optimizer = optim.SGD(model.parameters(), lr=LR)
    readings = {"whole": (PreconditionedSharpness(tol=0.01), EVERY), "batch": (BatchSharpness(pool=POOL), EVERY)}
    peak = 0.0, 0.0
    with Cockpit(
        model, optimizer, loss=losses, panel=None, instruments=readings, probe=batches((x, labels)), budget=None,
        sinks=[],
    ) as cockpit:  # fmt: skip
        for step in range(steps):
            rows = torch.randint(200, (size,))
            batch = x[rows], labels[rows]
            loss = losses(model, batch).mean()
            loss.backward()
            cockpit.observe(batch, loss)
            optimizer.step()
            optimizer.zero_grad()
            if step % EVERY == 0:
                whole, pooled = cockpit.last["whole"]["rho"], cockpit.last["batch"]["batch_sharpness"] * LR / 2
                if step >= EVERY * POOL or steps < EVERY * POOL:
                    peak = max(peak, (whole, pooled), key=lambda pair: pair[1])
                if step % (steps // 5 // EVERY * EVERY) == 0:
                    print(f"  B {size:3d}  step {step:5d}  whole {whole:.2f}  batch {pooled:.2f}  loss {loss:.2g}")
    return peak


def main() -> int:
    options = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--smoke", action="store_true", help=f"{SMOKE_STEPS} steps: too few to come near")
    given = options.parse_args()
    torch.set_num_threads(1)
    peaks = {size: train(given.seed, size, SMOKE_STEPS if given.smoke else STEPS) for size in SIZES}
    for size, (whole, batch) in peaks.items():
        print(f"batches of {size:2d}: sharpness {whole:.2f}, batch sharpness {batch:.2f} at its peak; the edge is 1")
    wholes = [whole for whole, _ in peaks.values()]
    passed = wholes == sorted(wholes, reverse=True) and all(whole < 1 for whole in wholes)
    return int(not (given.smoke or (passed and peaks[SIZES[-1]][1] > 2 * wholes[-1])))


if __name__ == "__main__":
    raise SystemExit(main())
