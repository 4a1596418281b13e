"""Traces and densities of the Hessians of models, judged by their own error bars against the dense spectrum.

`python tests/benchmarks/estimator_coverage.py` does the same on networks of two to three thousand parameters.
"""

from functools import cache

import numpy as np
import pytest
import torch
from cases import BY_NAME, build
from test_curvature import autograd_hessian, small_problem
from test_density import distance
from test_trace import ESTIMATORS
from torch import Tensor
from twins import dense_hessian

from instruments.linalg.density import spectral_density
from instruments.operators.operator import DenseOperator

DRAWS = 300
MODELS = ["blobs", "cnn_plain", "tied_attention", "recurrent"]


@cache
def hessian(name: str) -> Tensor:
    if name == "blobs":
        return autograd_hessian(*small_problem(0))
    built = build(BY_NAME[name])
    return dense_hessian(built.model, built.loss, built.batch)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_three_standard_errors_cover_the_trace_of_a_model(estimator: str, name: str) -> None:
    matrix = hessian(name)
    operator, truth = DenseOperator(matrix), float(matrix.trace())
    found = [ESTIMATORS[estimator](operator, matrix, seed) for seed in range(DRAWS)]
    assert sum(abs(t.value - truth) <= 3 * t.stderr for t in found) >= 0.99 * DRAWS
    errors, bars = (
        np.sqrt(np.mean(np.square(e))) for e in ([t.value - truth for t in found], [t.stderr for t in found])
    )
    assert bars < 2 * errors  # nor do they cover by saying nothing


@pytest.mark.parametrize("name", MODELS)
def test_the_density_of_a_model_is_within_its_band(name: str) -> None:
    """At the settings of the instrument: difference of the cumulative distributions, and their band, integrated."""
    matrix = hessian(name)
    values = torch.linalg.eigvalsh(matrix).tolist()
    for seed in range(3):
        difference, band = distance(spectral_density(DenseOperator(matrix), probes=6, steps=30, seed=seed), values)
        assert difference <= 3 * band
        assert band <= 0.05 * (values[-1] - values[0])
