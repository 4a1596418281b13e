"""The top eigenvalue against dense decompositions, and the ways in which power iteration goes wrong."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from instruments.linalg.lanczos import Ritz, top_eigenvalue
from instruments.linalg.tracking import AUDIT_EVERY, Track, follow
from instruments.operators.operator import DenseOperator, random_unit

NO_HINT = torch.zeros(62, dtype=torch.float64)


def matrix(eigenvalues: list[float], seed: int = 0) -> DenseOperator:
    g = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))
    return DenseOperator(q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T)


class Counting(DenseOperator):
    products = 0

    def matvec(self, v_D: torch.Tensor) -> torch.Tensor:
        self.products += 1
        return super().matvec(v_D)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.sampled_from([1e-2, 1e-4]))
def test_value_is_a_lower_bound_within_the_residual(seed: int, size: int, tol: float) -> None:
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(size, size, generator=g, dtype=torch.float64)
    operator = Counting(a + a.T)
    ritz = top_eigenvalue(operator, random_unit(operator, seed), tol=tol, max_products=200)
    eigenvalues = torch.linalg.eigvalsh(a + a.T)
    top = float(eigenvalues[-1])
    assert ritz.converged
    assert ritz.products == operator.products
    assert ritz.value <= top + 1e-9 * abs(top)
    assert float((eigenvalues - ritz.value).abs().min()) <= ritz.residual + 1e-9
    residual = operator.matvec(ritz.vector_D) - ritz.value * ritz.vector_D
    assert float(residual.norm()) == pytest.approx(ritz.residual, abs=1e-9 * (1 + abs(top)))
    assert float(ritz.vector_D.norm()) == pytest.approx(1)


def test_a_large_negative_eigenvalue_does_not_win() -> None:
    operator = matrix([-1.5, 1.0, *([0.1] * 20)])
    assert top_eigenvalue(operator, random_unit(operator, 0), tol=1e-6, max_products=50).value == pytest.approx(1.0)


def test_a_near_tie_of_opposite_sign_is_resolved() -> None:
    operator = matrix([1.0, -0.98, *torch.linspace(-0.5, 0.5, 60).tolist()])
    ritz = top_eigenvalue(operator, random_unit(operator, 0), tol=1e-4, max_products=60)
    assert ritz.converged
    assert ritz.value == pytest.approx(1.0, rel=1e-4)


def test_orthogonality_survives_float32() -> None:
    """Without reorthogonalisation eighty products give ghosts, and the exhausted basis is not noticed."""
    operator = matrix([100.0, *torch.linspace(0, 1, 80).tolist()])
    single = DenseOperator(operator._matrix_DD.float())
    ritz = top_eigenvalue(single, random_unit(single, 0), tol=0.0, max_products=200)
    assert ritz.value == pytest.approx(100.0, rel=1e-5)
    assert ritz.products <= 81


@pytest.mark.parametrize("size", [1, 2, 7])
def test_zero_operator_and_small_sizes(size: int) -> None:
    operator = DenseOperator(torch.zeros(size, size, dtype=torch.float64))
    ritz = top_eigenvalue(operator, random_unit(operator, 0), tol=1e-3, max_products=10)
    assert (ritz.value, ritz.residual, ritz.converged, ritz.products) == (0.0, 0.0, True, 1)


def test_all_negative_spectrum_has_a_negative_top() -> None:
    operator = matrix([-3.0, -2.0, -0.5, -1.0])
    assert top_eigenvalue(operator, random_unit(operator, 0), tol=1e-8, max_products=9).value == pytest.approx(-0.5)


def test_running_out_of_products_is_said() -> None:
    operator = matrix(torch.linspace(0.9, 1, 50).tolist())
    ritz = top_eigenvalue(operator, random_unit(operator, 0), tol=1e-9, max_products=4)
    assert (ritz.converged, ritz.products) == (False, 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_product_that_is_not_finite_ends_it(bad: float) -> None:
    operator = DenseOperator(torch.full((3, 3), bad, dtype=torch.float64))
    ritz = top_eigenvalue(operator, random_unit(operator, 0), tol=1e-3, max_products=10)
    assert math.isnan(ritz.value)
    assert not ritz.converged


def test_random_unit_depends_on_the_seed_alone() -> None:
    operator = matrix([1.0, 2.0, 3.0])
    state = torch.get_rng_state()
    first, again, other = (random_unit(operator, s) for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def kept(value: float, *vectors_D: Tensor, second: float = 0.0, readings: int = 9, **settings: int) -> Track:
    """As if these had been found by the reading before."""
    values = (value, second)[: len(vectors_D)]
    return Track(readings, values, torch.stack(vectors_D), **settings)  # type: ignore[arg-type]


def drifting(t: float) -> DenseOperator:
    """Two eigenvalues cross at t = 0.5; a lower bulk stays."""
    return matrix([2.0 - t, 1.0 + t, *torch.linspace(0, 0.4, 60).tolist()])


def test_a_warm_reading_is_cheap() -> None:
    track, costs = Track(), []
    for i in range(30):
        operator = drifting(0.01 * i)
        ritz, track = follow(operator, track, NO_HINT, tol=0.05, max_products=40, seed=i)
        assert ritz.value == pytest.approx(2.0 - 0.01 * i, rel=0.01)
        costs.append(ritz.products)
    assert costs[0] >= 4
    assert sorted(costs)[len(costs) // 2] <= 2


def test_an_overtaken_vector_is_found_by_the_audit() -> None:
    """Sitting on an exact eigenvector that is no longer the top: nothing but the fresh start can tell."""
    operator = matrix([2.0, 1.0, *torch.linspace(0, 0.4, 60).tolist()])
    _, vectors = torch.linalg.eigh(operator._matrix_DD)
    track = kept(1.0, vectors[:, -2], readings=AUDIT_EVERY - 1)
    values = []
    for i in range(2):
        ritz, track = follow(operator, track, NO_HINT, tol=0.05, max_products=40, seed=i)
        values.append(ritz.value)
        assert track.readings == AUDIT_EVERY + i
    assert values[1] == pytest.approx(2.0, rel=0.01)


def spectrum(top: float, second: float) -> DenseOperator:
    return matrix([top, second, *torch.linspace(0, 0.4, 60).tolist()])


def products_of(readings: int, track: Track, operators: Callable[[int], DenseOperator]) -> list[tuple[int, Track]]:
    rows = []
    for i in range(readings):
        ritz, track = follow(operators(i), track, NO_HINT, tol=0.05, max_products=40, seed=i)
        rows.append((ritz.products, track))
    return rows


def test_audits_of_a_calm_run_become_rare() -> None:
    rows = products_of(24, Track(), lambda i: spectrum(2.0, 1.0))
    audited = [i for i, (products, track) in enumerate(rows) if i and track.since == 0]
    assert audited == [1, 3, 7, 15, 23]
    assert all((products > 2) == (i in audited or i == 0) for i, (products, _) in enumerate(rows))


def test_an_audit_that_finds_something_is_followed_by_another_and_widens_the_bound() -> None:
    """The vector sits on the second eigenvector when an audit comes; a larger eigenvalue is half missing there."""
    operator = spectrum(2.0, 1.0)
    _, vectors = torch.linalg.eigh(operator._matrix_DD)
    sitting = kept(1.0, vectors[:, -2], period=8, since=7)
    first, track = follow(operator, sitting, NO_HINT * 0, tol=0.05, max_products=40, seed=0)
    assert first.value == pytest.approx(2.0, rel=0.01)
    assert (track.period, track.since, track.missed) == (1, 0, pytest.approx(0.5, abs=0.02))
    assert first.bound(0.05) == pytest.approx(1.0, rel=0.05)
    rows = products_of(3, track, lambda i: operator)
    assert [t.missed for _, t in rows] == pytest.approx([0.25, 0.25, 0.125], abs=0.02)
    assert [t.period for _, t in rows] == [2, 2, 4]


def test_the_bound_is_the_tolerance_after_an_audit_and_grows_until_the_next() -> None:
    found = Ritz(2.0, 0.01, 3, True, torch.zeros(1), missed=0.02)
    assert found.bound(0.05) == pytest.approx(0.05 * 2.0)
    assert [replace(found, since=n).bound(0.05) for n in (1, 2, 7)] == pytest.approx([0.15, 0.2, 0.45])
    assert found.bound(0.001) == pytest.approx(0.04)
    assert Ritz(2.0, 0.5, 3, True, torch.zeros(1)).bound(0.05) == 0.5
    ritz, after = follow(spectrum(2.0, 1.0), Track(9), NO_HINT, tol=0.05, max_products=40, seed=0)
    ages = [ritz.since]
    for seed in range(4):
        ritz, after = follow(spectrum(2.0, 1.0), after, NO_HINT, tol=0.05, max_products=40, seed=seed)
        ages.append(ritz.since)
    assert ages == [0, 0, 1, 0, 1]


def test_a_vector_that_turns_is_audited_at_once() -> None:
    """The top eigenvector becomes another one between two readings; the start contains a speck of it."""
    calm = spectrum(2.0, 0.4)
    _, vectors = torch.linalg.eigh(calm._matrix_DD)
    other = DenseOperator(calm._matrix_DD + 4 * torch.outer(vectors[:, 3], vectors[:, 3]))
    track = kept(2.0, vectors[:, -1], period=8, since=2)
    ritz, after = follow(other, track, vectors[:, 3] + 0.0, tol=0.05, max_products=40, seed=0)
    assert ritz.value == pytest.approx(float(torch.linalg.eigvalsh(other._matrix_DD)[-1]), rel=0.01)
    assert after.since == 0
    _, still = follow(calm, track, NO_HINT, tol=0.05, max_products=40, seed=0)
    assert still.since == 3


class KnowsOthers(DenseOperator):
    """Products with two vectors that are no top eigenvectors were taken by others."""

    def known(self) -> list[tuple[Tensor, Tensor]]:
        return [(v, self.matvec(v)) for v in torch.eye(self.size, dtype=self.dtype)[2:4]]


def test_products_of_others_are_no_answer_where_they_are_of_other_directions() -> None:
    """As of the Hessian for rho: its top eigenvector may be a lower one of the other matrix."""
    operator, track = KnowsOthers(torch.diag(torch.tensor([10.0, 5, 2, 1, *[0.5] * 20]).double())), Track()
    for i in range(12):
        ritz, track = follow(operator, track, NO_HINT[:24], tol=0.05, max_products=40, seed=i)
        assert ritz.value == pytest.approx(10.0, rel=0.01)
        assert ritz.products > 0


def test_what_is_followed_below_zero_is_not_doubted_for_its_sign() -> None:
    operator, track = matrix([-1.0, -2.0, *torch.linspace(-9, -4, 40).tolist()]), Track()
    costs = []
    for i in range(16):
        ritz, track = follow(operator, track, NO_HINT[:42], tol=0.05, max_products=40, seed=i)
        assert ritz.value == pytest.approx(-1.0, rel=0.03)
        costs.append(ritz.products)
    assert sorted(costs)[8] <= 4


def test_a_single_product_has_not_converged_by_itself() -> None:
    """In one dimension no gap is known: the residual must be small against the value."""
    operator = matrix([10.0, 5.0, 2.0, *torch.linspace(0, 1, 20).tolist()])
    ritz, _ = follow(operator, kept(2.0, random_unit(operator, 5)), NO_HINT[:23], tol=0.05, max_products=1, seed=0)
    assert ritz.residual > 0.2 * ritz.value
    assert not ritz.converged
    nothing = DenseOperator(torch.zeros(4, 4).double())
    ritz, _ = follow(nothing, kept(0.0, random_unit(nothing, 5)), NO_HINT[:4], tol=0.05, max_products=9, seed=0)
    assert (ritz.value, ritz.converged) == (0.0, True)


@pytest.mark.parametrize("second", [1.8, 1.0], ids=["by its last value", "by what the correction shows of it"])
def test_a_kept_vector_that_has_overtaken_is_found_without_an_audit(second: float) -> None:
    """The second eigenvector of the last reading is the first by now: without it there is nothing to be seen."""
    operator = spectrum(3.0, 2.0)
    _, vectors = torch.linalg.eigh(operator._matrix_DD)
    track = kept(2.0, vectors[:, -2], vectors[:, -1], second=second, period=8, since=2)
    alone = kept(2.0, vectors[:, -2], period=8, since=2)
    found, after = follow(operator, track, NO_HINT, tol=0.0675, max_products=40, seed=0)
    missed, _ = follow(operator, alone, NO_HINT, tol=0.0675, max_products=40, seed=0)
    assert (found.value, missed.value) == (pytest.approx(3.0, rel=0.01), pytest.approx(2.0, rel=0.01))
    assert after.since == 3
    assert found.products <= 4


def test_a_kept_vector_far_below_costs_nothing() -> None:
    operator = spectrum(2.0, 1.0)
    _, vectors = torch.linalg.eigh(operator._matrix_DD)
    track = kept(2.0, vectors[:, -1], vectors[:, -2], second=1.0, period=8, since=2)
    ritz, _ = follow(operator, track, NO_HINT, tol=0.0675, max_products=40, seed=0)
    assert ritz.products <= 2


def test_memory_of_another_size_or_of_a_broken_model_starts_cold() -> None:
    operator = matrix([3.0, 1.0, 0.5, 0.1])
    ritz, _ = follow(operator, kept(9.0, torch.ones(7)), NO_HINT[:4], tol=1e-6, max_products=9, seed=0)
    assert ritz.value == pytest.approx(3.0)
    broken = DenseOperator(torch.full((4, 4), math.nan, dtype=torch.float64))
    _, track = follow(broken, kept(3.0, torch.ones(4)), NO_HINT[:4], tol=1e-6, max_products=9, seed=0)
    assert track.vectors_kD is None
    ritz, _ = follow(operator, track, NO_HINT[:4] * math.nan, tol=1e-6, max_products=9, seed=0)
    assert ritz.value == pytest.approx(3.0)


@pytest.mark.parametrize("top", [1.15, 1.5])
def test_a_first_reading_looks_past_the_eigenvector_that_the_hint_has(top: float) -> None:
    """The gradient may lie along a lower eigenvector: the residual is small then before the largest has shown."""
    values_D = torch.cat([torch.linspace(-0.1, 0.3, 1000), torch.tensor([1.0, top])]).double()
    hint_D = torch.zeros_like(values_D)
    hint_D[-2] = 1
    for seed in range(5):
        ritz, _ = follow(DenseOperator(torch.diag(values_D)), Track(), hint_D, tol=0.0675, max_products=40, seed=seed)
        assert ritz.value == pytest.approx(top, rel=0.01)
        assert ritz.products <= 9
