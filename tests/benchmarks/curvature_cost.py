"""What one curvature reading costs along a training run, in products and in gradients, and how wrong it is.

    python tests/benchmarks/curvature_cost.py [mlp cnn transformer resnet] [--optimizers adam sgd] [--json]

One thread. Unit g: median CPU seconds of one gradient of the mean loss on the probe batch, measured at every reading
beside the methods. Reference: Lanczos from a random start to a residual of 1e-5. Ours are tracked readings (audits
included, the first reading left out); the peers, where they are installed, read the same weights cold, and none of them
offers rho. Errors are relative to the reference.
"""

import argparse
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from models import PROBLEMS, RESNET, Moment, Problem, trajectory
from torch import nn

from instruments import Instrument, Probe, View
from instruments.curvature.preconditioned_sharpness import PreconditionedSharpness
from instruments.curvature.sharpness import Sharpness
from instruments.held import HeldBatches
from instruments.linalg.lanczos import top_eigenvalue
from instruments.objective import as_objective
from instruments.operators.operator import random_unit

LOSS = nn.CrossEntropyLoss()
ALL = {**PROBLEMS, RESNET.name: RESNET}
Row = tuple[float, float, float]  # cost in g, relative error, products (-1: unknown)


def seconds_of(call: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.process_time()
    result = call()
    return result, time.process_time() - begun


def unit(moment: Moment) -> float:
    params = list(moment.model.parameters())
    x, y = moment.probe
    times = [seconds_of(lambda: torch.autograd.grad(LOSS(moment.model(x), y), params))[1] for _ in range(5)]
    return statistics.median(times)


def probe_of(moment: Moment, plans: dict[Any, Any]) -> Probe:
    """`plans` is what a run remembers of its model: whether it can be differentiated twice is looked at once."""
    seen = (moment.model, as_objective(LOSS), [moment.optimizer], [moment.batch])
    return Probe(*seen, step=moment.step, held=HeldBatches([moment.probe]), plans=plans)


class Ours:
    """A tracked instrument with its memory."""

    def __init__(self, instrument: Instrument, output: str) -> None:
        self.instrument, self.output, self.state = instrument, output, instrument.init()
        self.plans: dict[Any, Any] = {}

    def __call__(self, moment: Moment) -> tuple[float, float]:
        with probe_of(moment, self.plans) as probe:
            return self.read(probe)

    def read(self, probe: Probe) -> tuple[float, float]:
        view = View(probe, self.instrument.needs)
        values, self.state = self.instrument.advance(view, self.state)
        return float(values[self.output]), view.meter.products  # type: ignore[arg-type]


class Both:
    """Sharpness and rho at one step, which share graph, sample and products; the larger of their errors counts."""

    def __init__(self) -> None:
        self.readers = Ours(Sharpness(), "sharpness"), Ours(PreconditionedSharpness(), "rho")
        self.plans: dict[Any, Any] = {}

    def __call__(self, moment: Moment) -> tuple[list[float], float]:
        with probe_of(moment, self.plans) as probe:
            found = [reader.read(probe) for reader in self.readers]
        return [value for value, _ in found], sum(products for _, products in found)


def reference(moment: Moment, preconditioned: bool) -> float:
    with probe_of(moment, {}) as probe:
        view = View(probe, frozenset({"hessian", "preconditioner"}))
        operator = view.preconditioned if preconditioned else view.hessian
        return top_eigenvalue(operator, random_unit(operator, 1), tol=1e-5, max_products=300).value


def pyhessian(moment: Moment) -> tuple[float, float]:
    from pyhessian import hessian

    value = hessian(moment.model, LOSS, data=moment.probe, cuda=False).eigenvalues(top_n=1)[0][0]
    moment.model.train()
    moment.model.zero_grad()
    return float(value), -1


def curvlinops(moment: Moment) -> tuple[float, float]:
    import scipy.sparse.linalg as sla
    from curvlinops import HessianLinearOperator

    params = dict(moment.model.named_parameters())
    try:
        operator = HessianLinearOperator(moment.model, LOSS, params, [moment.probe], check_deterministic=False)
    except (TypeError, ValueError, AttributeError):  # before version 4 it takes a list
        operator = HessianLinearOperator(
            moment.model, LOSS, list(params.values()), [moment.probe], check_deterministic=False
        )
    size, calls = sum(p.numel() for p in params.values()), 0

    def product(v: Any) -> Any:
        nonlocal calls
        calls += 1
        return (operator @ torch.from_numpy(np.asarray(v, dtype=np.float32).ravel())).numpy()

    linear = sla.LinearOperator((size, size), matvec=product, dtype=np.float32)
    return float(sla.eigsh(linear, k=1, which="LA", tol=1e-2, return_eigenvectors=False)[0]), calls


def hessian_eigenthings(moment: Moment) -> tuple[float, float]:
    import hessian_eigenthings as he

    operator = he.HessianOperator(moment.model, [moment.probe], he.supervised_loss(LOSS))
    return float(he.lanczos(operator, k=1, which="LA", tol=1e-2, max_iter=20, seed=0).eigenvalues[0]), 20


def measure(problem: Problem, optimizer_name: str, readings: int, every: int) -> dict[str, list[Row]]:
    ours = {"sharpness": Ours(Sharpness(), "sharpness"), "rho": Ours(PreconditionedSharpness(), "rho")}
    both = Both()
    rows: dict[str, list[Row]] = {}
    run = trajectory(problem, seed=0, readings=readings, every=every, optimizer_name=optimizer_name)
    for index, moment in enumerate(run):
        grads = [p.grad for p in moment.model.parameters()]
        g = unit(moment)
        truth = {"sharpness": reference(moment, False), "rho": reference(moment, True)}
        for name, instrument in ours.items():
            (value, products), seconds = seconds_of(partial(instrument, moment))
            if index:
                row = (seconds / g, abs(value / truth[name] - 1), products)
                rows.setdefault(f"ours: {name}", []).append(row)
        (values, products), seconds = seconds_of(partial(both, moment))
        if index:
            error = max(abs(value / true - 1) for value, true in zip(values, truth.values(), strict=True))
            rows.setdefault("ours: both", []).append((seconds / g, error, products))
        for peer in (pyhessian, curvlinops, hessian_eigenthings):
            try:
                with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                    (value, products), seconds = seconds_of(partial(peer, moment))
            except ImportError:
                continue
            row = (seconds / g, abs(value / truth["sharpness"] - 1), products)
            rows.setdefault(f"{peer.__name__}: sharpness", []).append(row)
        for p, grad in zip(moment.model.parameters(), grads, strict=True):
            p.grad = grad
    return rows


def summary(rows: Iterable[Row]) -> dict[str, float]:
    table = np.array(list(rows))
    return {
        "readings": len(table),
        "products_median": float(np.median(table[:, 2])),
        "products_mean": float(table[:, 2].mean()),
        "cost_g_median": float(np.median(table[:, 0])),
        "cost_g_max": float(table[:, 0].max()),
        "error_median": float(np.median(table[:, 1])),
        "error_max": float(table[:, 1].max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("problems", nargs="*", help=f"of {', '.join(ALL)} (default: all)")
    parser.add_argument("--optimizers", nargs="+", choices=["adam", "sgd"], default=["adam", "sgd"])
    parser.add_argument("--readings", type=int, default=41)
    parser.add_argument("--every", type=int, default=20, help="steps between readings")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    results = {}
    for name, optimizer in itertools.product(arguments.problems or ALL, arguments.optimizers):
        rows = measure(ALL[name], optimizer, arguments.readings, arguments.every)
        results[f"{name} {optimizer}"] = found = {method: summary(row) for method, row in rows.items()}
        if arguments.json:
            continue
        print(f"{name}, {optimizer}: {arguments.readings - 1} readings, {arguments.every} steps apart")
        for method, s in found.items():
            print(
                f"  {method:32} products {s['products_median']:5.2f} (mean {s['products_mean']:5.1f})   cost "
                f"{s['cost_g_median']:6.1f} g (max {s['cost_g_max']:6.1f})   error {s['error_median']:.1e} "
                f"(max {s['error_max']:.1e})",
                flush=True,
            )
    if arguments.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
