"""Traces and densities of the Hessians of models, judged by their own error bars against the dense spectrum.

`python tests/benchmarks/estimator_coverage.py` does the same on networks of two to three thousand parameters.
"""

from functools import cache

import numpy as np
import pytest
import torch
from cases import BY_NAME, build
from test_trace import ESTIMATORS
from torch import Tensor
from twins import dense_hessian

from instruments.linalg.density import spectral_density
from instruments.operators.operator import DenseOperator

DRAWS = 100
WANTED = 0.97  # of few draws: 99 % is what the benchmark asks for
MODELS = ["cnn_plain", "tied_attention", "recurrent"]


@cache
def hessian(name: str) -> Tensor:
    built = build(BY_NAME[name])
    return dense_hessian(built.model, built.loss, built.batch)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_three_standard_errors_cover_the_trace_of_a_model(estimator: str, name: str) -> None:
    matrix = hessian(name)
    operator, truth = DenseOperator(matrix), float(matrix.trace())
    found = [ESTIMATORS[estimator](operator, matrix, seed) for seed in range(DRAWS)]
    assert sum(abs(t.value - truth) <= 3 * t.stderr for t in found) >= WANTED * DRAWS
    errors, bars = (
        np.sqrt(np.mean(np.square(e))) for e in ([t.value - truth for t in found], [t.stderr for t in found])
    )
    assert bars < 2 * errors  # nor do they cover by saying nothing


@pytest.mark.parametrize("name", MODELS)
def test_the_density_of_a_model_is_within_its_band(name: str) -> None:
    """At the settings of the instrument: difference to the true spectrum, smoothed alike, and band, integrated.

    Their quotient is 0.8 on average for bands that are standard errors.
    """
    matrix = hessian(name)
    values = torch.linalg.eigvalsh(matrix).numpy()
    quotients = []
    for seed in range(6):
        found = spectral_density(DenseOperator(matrix), probes=6, steps=30, seed=seed)
        scaled = (found.grid_G[:, None] - values) / found.width
        true_G = np.exp(-(scaled**2) / 2).mean(1) / (found.width * (2 * np.pi) ** 0.5)
        quotients.append(np.abs(found.density_G - true_G).sum() / found.band_G.sum())
    assert max(quotients) <= 3
    assert 0.3 < np.mean(quotients) < 1.5
