"""Trace estimators, judged by their own error bars; the dense oracle.

Shapes: D = size of the matrix, M = test vectors.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from instruments.linalg.dense import dense
from instruments.linalg.trace import (
    MIN_PROBES,
    MIN_XTRACE,
    Trace,
    deflated,
    hutch_plus_plus,
    hutchinson,
    xtrace,
)
from instruments.operators.operator import DenseOperator, Operator
from instruments.refusal import Refusal

D = 40
SPECTRA = {
    "flat": torch.linspace(0.5, 1.5, D).tolist(),
    "single": [1.0] + [0.0] * (D - 1),
    "outliers": [50.0, 20.0, 10.0, *torch.linspace(-0.5, 0.5, D - 3).tolist()],
    "exponential": [0.7**i for i in range(D)],
    "power": [1 / (i + 1) ** 2 for i in range(D)],
    "indefinite": torch.linspace(-1, 1, D).tolist(),
}
DRAWS = 300


def rotated(eigenvalues: list[float], seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))
    return q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T


def top(matrix: Tensor, count: int) -> Tensor:
    return torch.linalg.eigh(matrix).eigenvectors[:, -count:].T


class Counting(DenseOperator):
    products = 0

    def matvec(self, v_D: Tensor) -> Tensor:
        self.products += 1
        return super().matvec(v_D)


ESTIMATORS: dict[str, Callable[[Operator, Tensor, int], Trace]] = {
    "hutchinson": lambda a, m, seed: hutchinson(a, probes=MIN_PROBES, seed=seed),
    "deflated": lambda a, m, seed: deflated(a, top(m, 2), probes=MIN_PROBES, seed=seed),
    "hutch++": lambda a, m, seed: hutch_plus_plus(a, products=30, seed=seed),
    "xtrace": lambda a, m, seed: xtrace(a, products=MIN_XTRACE, seed=seed),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_three_standard_errors_cover_the_trace(name: str, spectrum: str) -> None:
    matrix = rotated(SPECTRA[spectrum])
    operator, truth = DenseOperator(matrix), sum(SPECTRA[spectrum])
    rounding = 1e-12 * float(matrix.abs().sum())
    results = [ESTIMATORS[name](operator, matrix, seed) for seed in range(DRAWS)]
    inside = sum(abs(t.value - truth) <= 3 * t.stderr + rounding for t in results)
    assert inside >= 0.99 * DRAWS
    # Nor is the bar so wide that it says nothing: the errors are of its size.
    errors = sum((t.value - truth) ** 2 for t in results) / DRAWS
    bars = sum(t.stderr**2 for t in results) / DRAWS
    assert bars < 3 * errors + rounding**2


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimates_scatter_round_the_truth(name: str) -> None:
    matrix = rotated(SPECTRA["outliers"])
    operator, truth = DenseOperator(matrix), float(matrix.trace())
    values = torch.tensor([ESTIMATORS[name](operator, matrix, s).value for s in range(DRAWS)], dtype=torch.float64)
    assert abs(float(values.mean()) - truth) < 3 * float(values.std()) / DRAWS**0.5


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(2, 12))
def test_standard_error_of_random_signs_is_the_scatter_of_coordinates(seed: int, size: int, probes: int) -> None:
    """Twin: all x * Ax held, and their sample variances added up. On average that is the variance of x'Ax."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(size, size, generator=g, dtype=torch.float64)
    a = a + a.T
    seen: list[Tensor] = []

    class Recording(DenseOperator):
        def matvec(self, v_D: Tensor) -> Tensor:
            seen.append(v_D)
            return super().matvec(v_D)

    result = hutchinson(Recording(a), probes=probes, seed=seed)
    d_MD = torch.stack([x * (a @ x) for x in seen])
    assert all(set(x.tolist()) <= {-1.0, 1.0} for x in seen)
    assert result.value == pytest.approx(float(d_MD.sum(1).mean()))
    assert result.stderr == pytest.approx(float(2 * d_MD.var(0).sum() / probes) ** 0.5, abs=1e-9)
    everything = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * size)
    forms = everything * (everything @ a)
    assert float(forms.sum(1).var(correction=0)) == pytest.approx(2 * float(forms.var(0, correction=0).sum()))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(5, 20), st.integers(3, 5), st.integers(1, 20))
def test_xtrace_is_its_leave_one_out_definition(seed: int, size: int, count: int, rank: int) -> None:
    """Twin: one QR decomposition for each test vector left out. Low ranks included."""
    count = min(count, size - 1)
    g = torch.Generator().manual_seed(seed)
    b = torch.randn(size, min(rank, size), generator=g, dtype=torch.float64)
    a = b @ b.T
    w_MD = torch.randn(count, size, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    estimates = []
    for i in range(count):
        others_DM = w_MD[[j for j in range(count) if j != i]].T
        left, singular, _ = torch.linalg.svd(a @ others_DM, full_matrices=False)
        q = left[:, singular > 1e-10 * singular[0]]
        outside = torch.eye(size, dtype=torch.float64) - q @ q.T
        v = outside @ w_MD[i]
        estimates.append(float((q.T @ a @ q).trace() + (size - count + 1) * (v @ a @ v) / (v @ v)))
    result = xtrace(DenseOperator(a), products=2 * count + 1, seed=seed + 1)
    expected = float(torch.tensor(estimates, dtype=torch.float64).mean())
    assert result.value == pytest.approx(expected, rel=1e-6)
    assert result.products == 2 * count


def test_deflation_is_exact_on_its_basis_and_pays_only_for_what_is_unknown() -> None:
    matrix = rotated(SPECTRA["single"])
    operator = Counting(matrix)
    result = deflated(operator, top(matrix, 1), probes=4, seed=0)
    assert result.value == pytest.approx(1.0, abs=1e-12)
    assert result.stderr < 1e-12
    assert (result.products, operator.products) == (5, 5)
    known = deflated(operator, top(matrix, 1), probes=4, seed=0, quotients=[1.0])
    assert (known.value, known.products) == (pytest.approx(1.0, abs=1e-12), 4)
    # Any orthonormal basis is unbiased; all of it is the trace itself.
    whole = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64)).Q.T
    assert deflated(operator, whole, probes=2, seed=0).value == pytest.approx(1.0, abs=1e-10)
    none = torch.empty(0, D, dtype=torch.float64)
    assert deflated(operator, none, probes=4, seed=0).value == hutchinson(operator, probes=4, seed=0).value
    with pytest.raises(ValueError, match="expected orthonormal rows"):
        deflated(operator, 2 * top(matrix, 1), probes=4, seed=0)


def test_deflation_beats_plain_probes_on_outliers() -> None:
    matrix = rotated(SPECTRA["outliers"])
    operator = DenseOperator(matrix)
    assert (
        deflated(operator, top(matrix, 3), probes=8, seed=0).stderr
        < 0.2 * hutchinson(operator, probes=8, seed=0).stderr
    )


@pytest.mark.parametrize("name", ESTIMATORS)
def test_products_are_counted_and_seeds_repeat(name: str) -> None:
    matrix = rotated(SPECTRA["power"])
    state = torch.random.get_rng_state()
    operator = Counting(matrix)
    first = ESTIMATORS[name](operator, matrix, 3)
    assert first.products == operator.products
    assert ESTIMATORS[name](operator, matrix, 3) == first
    assert ESTIMATORS[name](operator, matrix, 4) != first
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("products", [6, 7, 8, 30])
def test_hutch_plus_plus_spends_what_it_is_given(products: int) -> None:
    operator = Counting(rotated(SPECTRA["power"]))
    assert hutch_plus_plus(operator, products=products, seed=0).products == operator.products == products


def test_small_and_empty_matrices() -> None:
    exact = xtrace(DenseOperator(rotated([3.0, -1.0, 2.0])), products=6, seed=0)
    assert (exact.value, exact.stderr, exact.products) == (pytest.approx(4.0), 0.0, 3)
    zero = DenseOperator(torch.zeros(8, 8, dtype=torch.float64))
    for name in ("hutchinson", "hutch++"):
        assert ESTIMATORS[name](zero, torch.zeros(8, 8), 0) == Trace(0.0, 0.0, {"hutchinson": 16, "hutch++": 30}[name])
    assert xtrace(zero, products=10, seed=0).value == 0.0
    diagonal = DenseOperator(torch.diag(torch.arange(5.0)))
    assert hutchinson(diagonal, probes=2, seed=0) == Trace(10.0, 0.0, 2)
    assert hutch_plus_plus(DenseOperator(rotated([2.0, 1.0])), products=9, seed=0).value == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: hutchinson(a, probes=1, seed=0), "at least 2 probes"),
        (lambda a: hutch_plus_plus(a, products=5, seed=0), "at least 6 products for Hutch"),
        (lambda a: xtrace(a, products=5, seed=0), "at least 6 products for XTrace"),
    ],
)
def test_too_few_products(call: Callable[[Operator], Trace], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(DenseOperator(torch.eye(9)))


def test_single_precision() -> None:
    matrix = rotated(SPECTRA["outliers"])
    operator = DenseOperator(matrix.float())
    for name in ("hutchinson", "hutch++", "xtrace"):
        result = ESTIMATORS[name](operator, matrix, 0)
        assert abs(result.value - float(matrix.trace())) < 3 * result.stderr


def test_dense_matrix_and_spectrum() -> None:
    matrix = rotated(SPECTRA["outliers"])
    skew = torch.zeros(D, D, dtype=torch.float64)
    skew[0, 1], skew[1, 0] = 1e-3, -1e-3
    result = dense(DenseOperator(matrix + skew))
    assert torch.allclose(result.matrix_DD, matrix, atol=1e-14)
    assert result.asymmetry == pytest.approx(2 * float(skew.norm()) / float((matrix + skew).norm()))
    assert result.eigenvalues().tolist() == pytest.approx(sorted(SPECTRA["outliers"]))
    values_D, vectors_DD = result.eigenpairs()
    assert torch.allclose(vectors_DD @ torch.diag(values_D) @ vectors_DD.T, matrix, atol=1e-12)
    assert result.products == D
    with pytest.raises(Refusal, match="at most 39 parameters"):
        dense(DenseOperator(matrix), limit=39)
    with pytest.raises(Refusal, match="not finite"):
        dense(DenseOperator(torch.full((2, 2), float("nan"))))
    assert dense(DenseOperator(torch.zeros(3, 3))).asymmetry == 0.0
