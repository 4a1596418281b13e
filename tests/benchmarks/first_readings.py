"""Does the true sharpness lie within the bound of a first reading, which has no memory and no audit?

    python tests/benchmarks/first_readings.py [--seeds 60] [--more 0 4]

Two-layer networks (tanh and ReLU, 83 to 629 parameters) at initialisation, on 64 and 512 examples: squared error
against noise and against one-hot labels, cross entropy against labels and against distributions. The Hessian is held,
in float64 for the reference and in float32 for the readings. `--more`: products after the residual is small.
"""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian

from instruments.linalg import tracking
from instruments.operators.operator import DenseOperator

TOL = 0.0675
Problem = tuple[Tensor, Tensor, float]  # Hessian, gradient, largest eigenvalue


def problems(seeds: int) -> Iterator[Problem]:
    for activation in (nn.Tanh, nn.ReLU):
        for inputs, width, classes in ((6, 8, 3), (20, 24, 5)):
            for kind in ("noise", "distributions", "labels", "one-hot"):
                for n in (64, 512):
                    for seed in range(seeds):
                        torch.manual_seed(700 + seed)
                        layers = nn.Linear(inputs, width), activation(), nn.Linear(width, classes)
                        yield problem(nn.Sequential(*layers).double(), kind, n, seed)


def problem(model: nn.Sequential, kind: str, n: int, seed: int) -> Problem:
    generator = torch.Generator().manual_seed(5000 + seed)
    inputs, classes = model[0].in_features, model[2].out_features
    x = torch.randn(n, inputs, generator=generator).double()
    labels = torch.randint(classes, (n,), generator=generator) if seed % 2 else x[:, :classes].argmax(1)
    noise = torch.randn(n, classes, generator=generator).double()
    targets = {
        "noise": noise, "distributions": noise.softmax(1), "labels": labels,
        "one-hot": nn.functional.one_hot(labels, classes).double(),
    }[kind]  # fmt: skip
    loss = nn.MSELoss() if kind in ("noise", "one-hot") else nn.CrossEntropyLoss()
    named = dict(model.named_parameters())
    sizes = [p.numel() for p in named.values()]

    def loss_at(theta_D: Tensor) -> Tensor:
        pieces = zip(named.items(), theta_D.split(sizes), strict=True)
        value: Tensor = loss(
            functional_call(model, {k: piece.view(p.shape) for (k, p), piece in pieces}, (x,)), targets
        )
        return value

    theta_D = torch.cat([p.detach().flatten() for p in named.values()])
    h_DD, g_D = hessian(loss_at)(theta_D), grad(loss_at)(theta_D)
    h_DD = (h_DD + h_DD.T) / 2
    return h_DD.float(), g_D.float(), float(torch.linalg.eigvalsh(h_DD)[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=60)
    parser.add_argument("--more", type=int, nargs="+", default=[0, tracking.COLD])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known = list(problems(arguments.seeds))
    for more in arguments.more:
        tracking.COLD = more
        outside, worst, products = 0, 0.0, 0
        for number, (h_DD, g_D, true) in enumerate(known):
            seed = number % arguments.seeds
            ritz, _ = tracking.follow(DenseOperator(h_DD), tracking.Track(), g_D, tol=TOL, max_products=40, seed=seed)
            outside += true > (ritz.value + ritz.bound(TOL)) * (1 + 1e-5)
            worst, products = max(worst, 1 - ritz.value / true), products + ritz.products
        mean = products / len(known)
        print(f"{more} more: {outside} of {len(known)} outside the bound, worst {worst:.1%} low, {mean:.1f} products")


if __name__ == "__main__":
    main()
