"""Followed readings at the edge of stability, where eigenvalues crowd, beside readings to 1e-4.

    python tests/benchmarks/edge_tracking.py [--seeds 0 1 2] [--tol 0.01]

Gradient descent of R02 in the reproductions, rho every tenth step; counted from step 200 on, shortly before the edge.
Both are tracked; the exact one, read after the other, lends it no products. One thread, under a minute.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import optim

sys.path.insert(0, str(Path(__file__).parent / "reproductions"))

from training import Plan, half_squared_errors, network, sharpness_now, teacher_data, watch

from instruments.curvature.preconditioned_sharpness import PreconditionedSharpness

STEPS, EVERY, FROM, FAR = 1300, 10, 200, 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tol", type=float, default=0.01)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for seed in given.seeds:
        torch.manual_seed(seed)
        data, model = teacher_data(200, 0.2), network("tanh", 48)
        lr = 0.6 * 2 / sharpness_now(model, half_squared_errors, data)
        rho = PreconditionedSharpness(tol=given.tol), PreconditionedSharpness(tol=1e-4, max_products=200)
        plan = Plan(STEPS, instruments={"followed": (rho[0], EVERY), "exact": (rho[1], EVERY)})
        run = watch(model, optim.SGD(model.parameters(), lr=lr), half_squared_errors, data, plan)
        late = run.series("exact", "rho")[0] > FROM
        value, bound, true = (
            run.series(label, output)[1][late]
            for label, output in (("followed", "rho"), ("followed", "bound"), ("exact", "rho"))
        )
        products = [r.cost["products"] for r in run.readings if r.instrument == "followed" and r.step > FROM]
        low = true - value
        print(
            f"seed {seed}: {len(low)} readings, {int((low > FAR * true).sum())} more than {FAR:.0%} too low, "
            f"worst {float((low / true).max()):.1%}, inside the bound {float((low <= bound).double().mean()):.1%}, "
            f"products {sum(products) / len(products):.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
