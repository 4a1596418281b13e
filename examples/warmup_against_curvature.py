"""What warm-up is for, and when it helps: a learning rate eight times beyond the edge, cold and after 200 steps.

    python examples/warmup_against_curvature.py --seed 0

Gilmer et al. 2021, "A loss curvature perspective on training instability in deep learning". rho = eta lambda / 2 says
how far the rate is beyond what the curvature bears. Started at rho = 8 the loss is thrown up before training finds a
flat place. Warm-up gives the curvature time to fall: under cross entropy it does, as the examples are learnt, and rho
stays below 1 all the way. Under the squared error it does not fall far enough here, rho passes 1, and the same warm-up
to the same multiple of the edge ends in divergence (from other initial weights some runs are saved: R11 in
docs/reproductions.md). Warm up against curvature, not by a number of steps.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn, optim

from cockpit_bench import Cockpit, batches
from instruments.curvature.preconditioned_sharpness import PreconditionedSharpness
from instruments.curvature.sharpness import Sharpness

STEPS, WARMUP, SMOKE_STEPS, BEYOND = 600, 200, 60, 8.0


def problem(seed: int) -> tuple[nn.Sequential, tuple[Tensor, Tensor]]:
    """A tanh network with weights of variance 1 / inputs, and 200 examples labelled by a linear teacher."""
    torch.manual_seed(seed)
    x = torch.randn(200, 20)
    batch = x, (x @ torch.randn(20, 5)).argmax(1)
    model = nn.Sequential(nn.Linear(20, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 5))
    for layer in model[::2]:
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.zeros_(layer.bias)
    return model, batch


def cross_entropies(call: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(call(batch[0]), batch[1], reduction="none")


def squared_errors(call: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (call(batch[0]) - nn.functional.one_hot(batch[1], 5)).square().sum(1)


def train(seed: int, steps: int, losses: Callable[..., Tensor], warmup: int) -> float:
    """The highest loss over the first, the rate rising over `warmup` steps to BEYOND 2 / lambda(0)."""
    model, batch = problem(seed)
    optimizer, history = optim.SGD(model.parameters(), lr=1.0), []
    with Cockpit(
        model, optimizer, loss=losses, panel=None, instruments={"rho": (PreconditionedSharpness(tol=0.01), 10)},
        probe=batches(batch), budget=None, sinks=[],
    ) as cockpit:  # fmt: skip
        peak = BEYOND * 2 / cockpit.read(Sharpness(tol=1e-3), batch).values["sharpness"]
        for step in range(steps):
            lr = optimizer.param_groups[0]["lr"] = peak * min(1.0, (step + 1) / warmup)
            loss = losses(model, batch).mean()
            loss.backward()
            history.append(float(loss.detach()))
            if history[-1] > 1e3 * history[0]:
                print(f"  step {step:3d}  diverged")
                break
            cockpit.observe(batch, loss)
            if step in (0, 10, 20, 30, 40, 60, 100, 200, 400) or step == steps - 1:
                print(f"  step {step:3d}  eta {lr:6.2f}  rho {cockpit.last['rho']['rho']:7.2f}  loss {history[-1]:.2g}")
            optimizer.step()
            optimizer.zero_grad()
    return max(history) / history[0]


def main() -> int:
    options = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--smoke", action="store_true", help=f"{SMOKE_STEPS} steps, within the warm-up")
    given = options.parse_args()
    torch.set_num_threads(1)
    peaks = []
    for losses, warmup in ((cross_entropies, 1), (cross_entropies, WARMUP), (squared_errors, WARMUP)):
        print(f"{losses.__name__}, warm-up {warmup} steps, to eta = {2 * BEYOND:g} / lambda(0)")
        peaks.append(train(given.seed, SMOKE_STEPS if given.smoke else STEPS, losses, warmup))
    print("highest loss over the first: " + ", ".join(f"{peak:.3g}" for peak in peaks))
    print("expected: above 10 when cold, at most 1.1 when warmed up, divergence where curvature does not follow")
    return int(not (peaks[0] > 10 and peaks[1] <= 1.1 and (given.smoke or peaks[2] > 100)))


if __name__ == "__main__":
    raise SystemExit(main())
