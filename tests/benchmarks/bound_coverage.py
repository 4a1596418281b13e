"""Does the true eigenvalue lie within the bound that a reading gives? Counted over tracked readings along training.

    python tests/benchmarks/bound_coverage.py [mlp cnn transformer resnet] [--readings 30] [--every 5] [--json]

Sharpness, the smallest eigenvalue and rho, each with the memory of its readings before, while heavy ball and Adam
train small networks on mini-batches; also from initialisations scaled up four times, where the loss is far from convex
and its most negative eigenvalue may be larger than the largest. Reference: implicitly restarted Lanczos of SciPy
(ARPACK) on the same products, to a relative 1e-6. A reading counts as inside when |value - reference| <= bound, but for
single-precision rounding, 1e-5 of the largest |eigenvalue|. "negative leads" is the share of readings where that is a
negative one. One thread; `--readings` is by instrument and run, there are 16 runs. Exits with 1 below 98 %.
"""

import argparse
import json
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse.linalg as sla
import torch
from models import Moment
from small_models import OPTIMIZERS, SMALL, trained
from torch import nn

from instruments import Instrument, Probe, View
from instruments.curvature.preconditioned_sharpness import PreconditionedSharpness
from instruments.curvature.sharpness import Sharpness
from instruments.curvature.smallest import Smallest
from instruments.held import HeldBatches
from instruments.objective import as_objective
from instruments.operators.operator import Operator

LOSS = nn.CrossEntropyLoss()
ROUNDING = 1e-5
WANTED = 0.98
SCALES = (1.0, 4.0)
INSTRUMENTS: Mapping[str, Instrument] = {
    "sharpness": Sharpness(),
    "smallest": Smallest(),
    "rho": PreconditionedSharpness(),
}


@dataclass(frozen=True)
class Read:
    """One reading beside its reference; `scale` is the largest |eigenvalue| of its matrix, `negative_leads` whether
    it is a negative one."""

    value: float
    bound: float
    reference: float
    scale: float
    products: int
    converged: bool
    negative_leads: bool

    @property
    def inside(self) -> bool:
        return abs(self.value - self.reference) <= self.bound + ROUNDING * self.scale


def extremes(operator: Operator) -> tuple[float, float]:
    """Smallest and largest eigenvalue, by ARPACK on float64 vectors round the operator's own products."""

    def product(v: Any) -> Any:
        return operator.matvec(torch.from_numpy(np.asarray(v).ravel()).to(operator.dtype)).double().numpy()

    linear = sla.LinearOperator((operator.size, operator.size), matvec=product, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(operator.size)
    ends = sla.eigsh(linear, k=2, which="BE", tol=1e-6, v0=start, ncv=40, return_eigenvectors=False)
    return float(ends.min()), float(ends.max())


def probe_of(moment: Moment, plans: dict[Any, Any]) -> Probe:
    held = HeldBatches([moment.probe])
    return Probe(
        moment.model, as_objective(LOSS), [moment.optimizer], [moment.batch], step=moment.step, held=held, plans=plans
    )


def series(moments: Iterable[Moment]) -> dict[str, list[Read]]:
    """All three instruments along one run."""
    states = {name: instrument.init() for name, instrument in INSTRUMENTS.items()}
    found: dict[str, list[Read]] = defaultdict(list)
    plans: dict[Any, Any] = {}
    for moment in moments:
        with probe_of(moment, plans) as probe:
            view = View(probe, frozenset({"hessian", "preconditioner"}))
            (low, high), (least, rho) = extremes(view.hessian), extremes(view.preconditioned)
        truth = {"sharpness": (high, low, high), "smallest": (low, low, high), "rho": (rho, least, rho)}
        for name, instrument in INSTRUMENTS.items():
            with probe_of(moment, plans) as probe:  # a probe of its own: no products of the others to lean on
                view = View(probe, instrument.needs)
                values, states[name] = instrument.advance(view, states[name])
            value, bound = float(values[name]), float(values.get("bound", values["residual"]))  # type: ignore[arg-type]
            reference, bottom, top = truth[name]
            found[name].append(
                Read(
                    value,
                    bound,
                    reference,
                    max(-bottom, top),
                    view.meter.products,
                    bool(values["converged"]),
                    -bottom > top,
                )
            )
    return found


def summary(reads: Iterable[Read]) -> dict[str, float]:
    reads = list(reads)
    errors = np.array([abs(r.value - r.reference) / r.scale for r in reads])
    return {
        "readings": len(reads),
        "inside": sum(r.inside for r in reads) / len(reads),
        "converged": sum(r.converged for r in reads) / len(reads),
        "error_median": float(np.median(errors)),
        "error_max": float(errors.max()),
        "bound_median": float(np.median([r.bound / r.scale for r in reads])),
        "negative_leads": sum(r.negative_leads for r in reads) / len(reads),
        "products_mean": float(np.mean([r.products for r in reads])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", help=f"of {', '.join(SMALL)} (default: all)")
    parser.add_argument("--readings", type=int, default=30, help="by instrument and run")
    parser.add_argument("--every", type=int, default=5, help="steps between readings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    results: dict[str, dict[str, float]] = {}
    every: dict[str, list[Read]] = defaultdict(list)
    for model in arguments.models or SMALL:
        for optimizer in OPTIMIZERS:
            for scale in SCALES:
                moments = trained(
                    model, optimizer, scale=scale, seed=arguments.seed, readings=arguments.readings,
                    every=arguments.every,
                )  # fmt: skip
                for name, reads in series(moments).items():
                    title = f"{model}, {optimizer}, initialisation x{scale:g}: {name}"
                    results[title] = summary(reads)
                    every[name] += reads
                    every["all"] += reads
                    _say(title, results[title], arguments.json)
    for name, reads in every.items():
        results[name] = summary(reads)
        _say(name, results[name], arguments.json)
    if arguments.json:
        print(json.dumps(results, indent=2))
    sys.exit(0 if results["all"]["inside"] >= WANTED else 1)


def _say(title: str, s: dict[str, float], quiet: bool) -> None:
    if not quiet:
        print(
            f"{title:50} {s['readings']:5.0f} readings   inside {s['inside']:6.1%}   converged {s['converged']:5.0%}   "
            f"error {s['error_median']:.1e} (max {s['error_max']:.1e})   bound {s['bound_median']:.1e}   "
            f"products {s['products_mean']:4.1f}   negative leads {s['negative_leads']:4.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
