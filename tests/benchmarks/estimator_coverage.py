"""Do the error bars of trace and spectral density hold? Counted over independent draws on trained networks.

    python tests/benchmarks/estimator_coverage.py [mlp cnn transformer resnet] [--draws 300] [--densities 30] [--json]

Networks of two to three thousand parameters, after some steps of Adam. The truth is the dense Hessian in double
precision, column by column from the same operator that readings use, and its eigenvalues. Trace: the share of draws
within three of their own standard errors of the true trace, for Hutchinson with random signs, deflated with the four
top eigenvectors, Hutch++ and XTrace, all at the least number of products that their documentation asks for. Density:
the integrated difference between the density as given and the true spectrum under the same smoothing, over the
integral of the band that is given with it; for bands that are standard errors it is 0.8 on average. It is inside up to
3. Beside it the same for the unsmoothed nodes (cumulative distributions), whose spacing the band knows nothing
of. Exits with 1 below 99 % of either. One thread.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from small_models import SMALL, trained
from torch import Tensor, nn

from instruments import Probe, View
from instruments.held import HeldBatches
from instruments.linalg.dense import dense
from instruments.linalg.density import Density, spectral_density
from instruments.linalg.trace import MIN_PROBES, MIN_XTRACE, Trace, deflated, hutch_plus_plus, hutchinson, xtrace
from instruments.objective import as_objective
from instruments.operators.operator import DenseOperator

Array = npt.NDArray[np.float64]
WANTED = 0.99
PROBES, STEPS, POINTS = 6, 30, 20_001
Estimator = Callable[[DenseOperator, Tensor, int], Trace]
ESTIMATORS: Mapping[str, Estimator] = {
    "hutchinson": lambda a, top_KD, seed: hutchinson(a, probes=MIN_PROBES, seed=seed),
    "deflated": lambda a, top_KD, seed: deflated(a, top_KD, probes=MIN_PROBES, seed=seed),
    "hutch++": lambda a, top_KD, seed: hutch_plus_plus(a, products=30, seed=seed),
    "xtrace": lambda a, top_KD, seed: xtrace(a, products=MIN_XTRACE, seed=seed),
}


def hessian_of(name: str) -> Tensor:
    """The dense Hessian after 60 steps, float64."""
    *_, moment = trained(name, "adam", readings=4, every=20)
    model, loss = moment.model.double(), as_objective(nn.CrossEntropyLoss())
    batch = tuple(t.double() if t.is_floating_point() else t for t in moment.probe)
    with Probe(model, loss, [], [batch], held=HeldBatches([batch])) as probe:
        return dense(View(probe, frozenset({"hessian"})).hessian, limit=5_000).matrix_DD


def covered(
    estimator: Estimator, operator: DenseOperator, top_KD: Tensor, truth: float, draws: int
) -> dict[str, float]:
    found = [estimator(operator, top_KD, seed) for seed in range(draws)]
    errors = np.array([t.value - truth for t in found])
    bars = np.array([t.stderr for t in found])
    return {
        "draws": draws,
        "inside": float((np.abs(errors) <= 3 * bars).mean()),
        "error_rms": float(np.sqrt((errors**2).mean()) / abs(truth)),
        "bar_over_error": float(np.sqrt((bars**2).mean() / (errors**2).mean())),
        "products": found[0].products,
    }


def distances(measured: Density, values_D: Array) -> tuple[float, float]:
    """Integrated difference over the integral of the band: smoothed densities, and cumulative distributions."""
    grid, width = measured.grid_G, measured.width
    true_G = np.mean([np.exp(-(((grid - v) / width) ** 2) / 2) for v in values_D], 0) / (width * np.sqrt(2 * np.pi))
    smoothed = np.abs(measured.density_G - true_G).sum() / measured.band_G.sum()
    at = np.linspace(values_D[0], values_D[-1], POINTS)
    share, band = measured.cumulative(at)
    below = np.searchsorted(values_D, at, side="right") / len(values_D)
    return float(smoothed), float(np.abs(share - below).sum() / band.sum())


def densities(operator: DenseOperator, values_D: Array, count: int) -> dict[str, float]:
    found = [spectral_density(operator, probes=PROBES, steps=STEPS, seed=seed) for seed in range(count)]
    smoothed, nodes = np.array([distances(density, values_D) for density in found]).T
    return {
        "densities": count,
        "inside": float((smoothed <= 3).mean()),
        "difference_over_band": float(smoothed.mean()),
        "worst": float(smoothed.max()),
        "of_nodes": float(nodes.mean()),
        "band_integral": float(np.mean([d.band_G.sum() * (d.grid_G[1] - d.grid_G[0]) for d in found])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", help=f"of {', '.join(SMALL)} (default: all)")
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--densities", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    results: dict[str, dict[str, float]] = {}
    for model in arguments.models or SMALL:
        matrix_DD = hessian_of(model)
        values_D, vectors_DD = torch.linalg.eigh(matrix_DD)
        operator = DenseOperator(matrix_DD.float())
        top_KD, truth = vectors_DD[:, -4:].T.float().contiguous(), float(matrix_DD.trace())
        for name, estimator in ESTIMATORS.items():
            results[f"{model}, trace by {name}"] = covered(estimator, operator, top_KD, truth, arguments.draws)
        results[f"{model}, density"] = densities(operator, values_D.numpy(), arguments.densities)
        if not arguments.json:
            for title, row in results.items():
                if title.startswith(model):
                    print(f"{title:32}", "   ".join(f"{k} {v:.3g}" for k, v in row.items()), flush=True)
    if arguments.json:
        print(json.dumps(results, indent=2))
    sys.exit(0 if all(row["inside"] >= WANTED for row in results.values()) else 1)


if __name__ == "__main__":
    main()
