"""A quadratic bowl in 100 dimensions with noisy examples: every quantity of it is known.

Spectrum after the deep quadratic problem of DeepOBS (Schneider, Balles and Hennig, ICLR 2019): many small
eigenvalues, a few large ones, in a random basis.

Legend: N examples, D = 100 dimensions.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from workloads.workload import Data, hashed

SEED = 42
NUM_TRAIN, NUM_VALID = 1024, 256

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Bowl:
    """What the examples are drawn from: x ~ N(mean_D, covariance_DD), and the curvature the loss weighs them with.

    `curvature_DD` has 90 eigenvalues from U(0, 1) and 10 from U(30, 60). `covariance_DD` has eigenvalues from
    U(0.1, 1.9) in a basis of its own, so that it does not commute with the curvature: a covariance put in the wrong
    basis, or on the wrong side, shows. The mean is about 10 away from the origin, so that weight decay pulls away
    from the solution instead of towards it.
    """

    curvature_DD: Array
    covariance_DD: Array
    mean_D: Array


def bowl() -> Bowl:
    """The one bowl of this project, in float64."""
    rng = np.random.default_rng(SEED)
    spectrum_D = np.concatenate([rng.uniform(0, 1, 90), rng.uniform(30, 60, 10)])
    curvature_DD = _symmetric(spectrum_D, rng)
    covariance_DD = _symmetric(rng.uniform(0.1, 1.9, 100), rng)
    return Bowl(curvature_DD, covariance_DD, rng.standard_normal(100))


def examples() -> Data:
    """1,024 examples x_ND to train on and 256 to validate on, float32.

    The arithmetic is float64 and rounded once at the end, so that another linear algebra library, which differs in
    the last bits, gives the same examples.
    """
    truth = bowl()
    rng = np.random.default_rng([SEED, 1])
    noise_ND = rng.standard_normal((NUM_TRAIN + NUM_VALID, 100))
    x_ND = truth.mean_D + noise_ND @ np.linalg.cholesky(truth.covariance_DD).T
    rounded_ND = torch.tensor(x_ND, dtype=torch.float32)
    return hashed((rounded_ND[:NUM_TRAIN],), (rounded_ND[NUM_TRAIN:],))


def _symmetric(spectrum_D: Array, rng: np.random.Generator) -> Array:
    """Symmetric matrix with that spectrum in a basis drawn uniformly from all rotations and reflections.

    The signs that a QR factorisation leaves open are fixed by the diagonal of R (Mezzadri, 2007, section 5).
    """
    basis_DD, triangle_DD = np.linalg.qr(rng.standard_normal((len(spectrum_D),) * 2))
    basis_DD = basis_DD * np.sign(np.diag(triangle_DD))
    matrix_DD = (basis_DD * spectrum_D) @ basis_DD.T
    symmetric: Array = (matrix_DD + matrix_DD.T) / 2
    return symmetric
