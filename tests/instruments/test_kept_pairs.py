"""What kept Ritz pairs say of an operator that has changed a little, against its dense decomposition."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from instruments.linalg.kept_pairs import KEPT, KeptPairs, keep
from instruments.linalg.subspace import Subspace
from instruments.operators.operator import DenseOperator

SIZE = 40
SEEDS = st.integers(0, 10**6)


def symmetric(seed: int) -> tuple[DenseOperator, Tensor]:
    """Eigenvalues 2, 1.6, 1.3, 1 over a bulk; the eigenvectors as rows, the largest first."""
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=g, dtype=torch.float64))
    values = torch.tensor([2.0, 1.6, 1.3, 1.0, *np.linspace(0.4, -0.2, SIZE - 4)], dtype=torch.float64)
    return DenseOperator(q @ torch.diag(values) @ q.T), q.T


def beside(rows: Tensor, seed: int, size: float) -> Tensor:
    """Near the first row, off by a random vector of that length."""
    g = torch.Generator().manual_seed(seed + 1)
    off = torch.randn(SIZE, generator=g, dtype=torch.float64)
    return rows[0] + size * off / off.norm()


def exact(rows: Tensor, count: int) -> KeptPairs:
    return KeptPairs([2.0, 1.6, 1.3, 1.0][:count], rows[:count])


@settings(deadline=None, max_examples=50)
@given(SEEDS, st.floats(1e-4, 0.1))
def test_the_error_of_a_ritz_value_is_that_of_its_residual_over_the_gaps(seed: int, size: float) -> None:
    operator, rows = symmetric(seed)
    space, last = Subspace(operator, rows[:4]), exact(rows, 4)
    space.add(beside(rows, seed, size))
    top = space.pairs()
    claimed, true = last.error(top), 2.0 - top.value
    assert 0.9 * true <= claimed <= 2.2 * true  # the bulk is taken to begin at the last one kept


@settings(deadline=None, max_examples=50)
@given(SEEDS)
def test_a_correction_with_the_gaps_gains_more_than_the_residual(seed: int) -> None:
    """What is missing lies along the second eigenvector and along the bulk, whose gaps differ by a factor of five."""
    operator, rows = symmetric(seed)
    start, left = rows[0] + 0.03 * rows[1] + 0.03 * rows[20], []
    for count in (4, 1):
        space = Subspace(operator, rows[:count])
        space.add(start)
        before = 2.0 - space.pairs().value
        space.add(exact(rows, count).correction(space.pairs()))
        left.append((2.0 - space.pairs().value) / before)
    assert left[0] < 0.05
    assert left[1] > 0.1


@settings(deadline=None, max_examples=50)
@given(SEEDS)
def test_where_the_kept_pairs_are_all_there_is_what_is_kept_next_is_exact(seed: int) -> None:
    """An operator without a bulk: of any two products and the kept pairs the complement is known."""
    _, rows = symmetric(seed)
    operator = DenseOperator(
        rows[:4].T @ torch.diag(torch.tensor(exact(rows, 4).values, dtype=torch.float64)) @ rows[:4]
    )
    g = torch.Generator().manual_seed(seed)
    space, last = Subspace(operator, rows[:4]), exact(rows, 4)
    for v_6 in torch.randn(2, 6, generator=g, dtype=torch.float64):
        space.add(v_6 @ rows[:6])
    kept = keep(space, space.pairs(), last)
    v_kD = kept.vectors_kD
    assert torch.allclose(v_kD @ v_kD.T, torch.eye(len(v_kD)).double(), atol=1e-9)
    matrix = v_kD @ operator._matrix_DD @ v_kD.T
    assert torch.allclose(matrix[1:, 1:], torch.diag(torch.tensor(kept.values[1:], dtype=torch.float64)), atol=1e-9)


@settings(deadline=None, max_examples=50)
@given(SEEDS)
def test_kept_pairs_are_orthonormal_and_begin_with_the_answer(seed: int) -> None:
    operator, rows = symmetric(seed)
    space, last = Subspace(operator, rows[:4]), exact(rows, 4)
    for v_D in (beside(rows, seed, 0.1), rows[2] + 0.1 * rows[7]):
        space.add(v_D)
    top = space.pairs()
    kept = keep(space, top, last)
    assert torch.allclose(kept.vectors_kD @ kept.vectors_kD.T, torch.eye(KEPT).double(), atol=1e-9)
    assert torch.equal(kept.vectors_kD[0], top.vector_D)
    assert kept.values[0] == top.value
    assert list(kept.values[1:]) == pytest.approx([1.6, 1.3, 1.0], abs=0.06)
    matrix = kept.vectors_kD @ operator._matrix_DD @ kept.vectors_kD.T
    assert matrix.diagonal().tolist() == pytest.approx(list(kept.values), abs=0.06)


def test_what_was_not_looked_at_keeps_its_old_value() -> None:
    operator, rows = symmetric(0)
    space = Subspace(operator, rows[:2])
    space.add(rows[0])
    kept = keep(space, space.pairs(), KeptPairs([2.0, 1.9], rows[:2]))
    assert list(kept.values) == pytest.approx([2.0, 1.9])
    assert abs(float(kept.vectors_kD[1] @ rows[1])) == pytest.approx(1.0)
    space.add(rows[1])
    assert list(keep(space, space.pairs(), KeptPairs([2.0, 1.9], rows[:2])).values) == pytest.approx([2.0, 1.6])


@pytest.mark.parametrize(
    ("last", "inside", "rival"),
    [
        (1.85, 0.0, True), (1.83, 0.0, False),  # by its last value, 0.08 of 2 below at most
        (0.1, 0.3, False), (2.5, 0.3, False),  # by what is seen of it, which is 1.6
        (2.5, 1.0, False),  # the subspace has it
    ],
)  # fmt: skip
def test_who_is_a_rival(last: float, inside: float, rival: bool) -> None:
    operator, rows = symmetric(0)
    space = Subspace(operator, rows[:2])
    space.add(rows[0])
    if inside:
        space.add(inside * rows[1] + (1 - inside**2) ** 0.5 * rows[20])
    found = KeptPairs([2.0, last], rows[:2]).rival(space.pairs())
    assert (found is not None) == rival


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rivals_are_found_below_zero_too(sign: float) -> None:
    """Of the eigenvalues -2 and -1.9, the second was kept and is the larger."""
    operator = DenseOperator(torch.diag(torch.tensor([-2.0, -1.9, -5.0, -7.0])).double())
    space = Subspace(operator, torch.eye(4).double()[:2])
    space.add(torch.eye(4).double()[0] * sign)
    assert KeptPairs([-2.0, -2.15], torch.eye(4).double()[:2]).rival(space.pairs()) is not None
    assert KeptPairs([-2.0, -2.17], torch.eye(4).double()[:2]).rival(space.pairs()) is None
