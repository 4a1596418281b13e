"""rho for optimizers of your own: Shampoo, whose preconditioner is no diagonal, and schedule-free SGD.

    python examples/third_party_optimizer.py --seed 0

Gupta et al. 2018, "Shampoo"; Defazio et al. 2024, "The road less scheduled". The optimizers are written as a user would
write them; a reader of a few lines each tells the cockpit what they multiply the gradient with.
"""

import argparse
from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor, nn, optim

from cockpit_bench import Cockpit, batches
from instruments.preconditioners import Scale, reads


class Shampoo(optim.Optimizer):
    def __init__(self, params, lr: float = 0.1, momentum: float = 0.9, eps: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "eps": eps})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state, direction = self.state[p], p.grad
                state["statistics"] = statistics(group, state, p.grad)
                for values, q in map(
                    torch.linalg.eigh, state["statistics"]
                ):  # each turn moves one dimension to the end
                    root = q @ torch.diag(values ** (-0.5 / p.ndim)) @ q.T
                    direction = torch.tensordot(direction, root, dims=([0], [0]))
                state["buffer"] = group["momentum"] * state.get("buffer", 0) + direction
                p -= group["lr"] * state["buffer"]


def statistics(group: dict, state: dict, grad: Tensor) -> list[Tensor]:
    """Sums of g g' over all other dimensions, for each dimension of the parameter, the gradient at hand included."""
    rows = [grad.movedim(k, 0).flatten(1) if grad.ndim > 1 else grad[:, None] for k in range(grad.ndim)]
    old = state.get("statistics") or [group["eps"] * torch.eye(len(r), dtype=r.dtype) for r in rows]
    return [s + r @ r.T for s, r in zip(old, rows, strict=True)]


@reads(Shampoo)
def shampoo(group: dict, state: dict, p: Tensor, grad: Tensor) -> Scale:
    """D = lr/(1 + mu) L^(-1/4) (x) R^(-1/4), diagonal in the eigenvectors; heavy ball's gain is 1/(1 + mu)."""
    pairs = [torch.linalg.eigh(s) for s in statistics(group, state, grad)]
    sizes = reduce(lambda a, b: a[..., None] * b, [values ** (-0.5 / p.ndim) for values, _ in pairs])
    return Scale(group["lr"] / (1 + group["momentum"]) * sizes, basis=[q for _, q in pairs])


class ScheduleFreeSGD(optim.Optimizer):
    """The parameters are y, where gradients are taken: between z, which makes the steps, and x, its average."""

    def __init__(self, params, lr: float = 4.0, beta: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for y in group["params"]:
                state, beta = self.state[y], group["beta"]
                z, t = state.get("z", y.clone()), state.get("t", 0)
                x, c = (y - (1 - beta) * z) / beta, 1 / (t + 1)
                z = z - group["lr"] * (y.grad + group["weight_decay"] * y)
                y.copy_((1 - beta) * z + beta * ((1 - c) * x + c * z))
                state["z"], state["t"] = z, t + 1


@reads(ScheduleFreeSGD)
def schedule_free(group: dict, state: dict, p: Tensor, grad: Tensor) -> Scale:
    """With c held fixed y follows the filter F = (1 - beta) + beta EMA(c), and EMA(c) has the gain c/(2 - c) at -1."""
    beta, c = group["beta"], 1 / (state.get("t", 0) + 1)
    return Scale(group["lr"] * ((1 - beta) + beta * c / (2 - c)), group["weight_decay"])


def train(name: str, make: Callable, seed: int, steps: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(200, 10)
    batch, loss_fn = (x, torch.sin(x @ torch.randn(10, 3))), nn.MSELoss()
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 3))
    optimizer = make(model.parameters())
    how = {"probe": batches(batch), "panel": None, "budget": None, "sinks": [], "steps": steps}
    labels = {"curvature/preconditioned_sharpness": steps // 4, "step/step_ratio": steps // 4}
    with Cockpit(model, optimizer, loss=loss_fn, instruments=labels, **how) as cockpit:
        for step in range(steps):
            optimizer.zero_grad()
            loss = loss_fn(model(x), batch[1])
            loss.backward()
            cockpit.observe(batch, loss)
            optimizer.step()
            if step % (steps // 4) == 0:
                rho, r = (cockpit.last[label][key] for label, key in zip(labels, ("rho", "r"), strict=True))
                print(f"{name:14s} step {step:4d}   loss {loss.item():.4f}   rho {rho:.3f}   step ratio {r:.3f}")


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--smoke", action="store_true", help="40 steps instead of 1000")
    given = options.parse_args()
    torch.set_num_threads(1)
    for name, make in (("Shampoo", Shampoo), ("schedule-free", ScheduleFreeSGD)):
        train(name, make, given.seed, 40 if given.smoke else 1000)
