"""What the products of others are worth: the Ritz pair of their span, and readings that cost nothing more."""

import math

import pytest
import torch
from cases import BY_NAME, build
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from instruments import Probe, View
from instruments.curvature.preconditioned_sharpness import PreconditionedSharpness
from instruments.curvature.sharpness import Sharpness
from instruments.held import HeldBatches
from instruments.linalg.lanczos import krylov_spaces
from instruments.linalg.subspace import Subspace
from instruments.objective import as_objective
from instruments.operators.operator import DenseOperator
from instruments.operators.preconditioned import PreconditionedOperator


def dense(a: Tensor) -> tuple[DenseOperator, Subspace]:
    operator = DenseOperator(a)
    return operator, Subspace(operator)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 8), st.integers(2, 6))
def test_the_pairs_are_those_of_the_projected_matrix(seed: int, size: int, count: int) -> None:
    """Every other product is given, as by another reading."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(size, size, generator=g, dtype=torch.float64)
    a = a + a.T
    v_kD = torch.randn(min(count, size), size, generator=g, dtype=torch.float64)
    assume(float(torch.linalg.cond(v_kD)) < 50)  # nearly dependent vectors are left out
    _, space = dense(a)
    added = [space.add(v, a @ v if i % 2 else None) for i, v in enumerate((*v_kD, v_kD[0] + v_kD[1]))]
    assert added == [True] * len(v_kD) + [False]
    assert space.products == (len(v_kD) + 1) // 2
    pairs, (q_Dk, _) = space.pairs(), torch.linalg.qr(v_kD.T)
    values_k = torch.linalg.eigvalsh(q_Dk.T @ a @ q_Dk)
    assert pairs.values_m.tolist() == pytest.approx(values_k.tolist()[::-1], abs=1e-8)
    residual_D = a @ pairs.vector_D - pairs.value * pairs.vector_D
    assert torch.allclose(pairs.residual_D, residual_D, atol=1e-8)
    assert pairs.residual == pytest.approx(float(residual_D.norm()), abs=1e-8)
    vectors_mD = torch.from_numpy(pairs.rotation_mm) @ space.basis_mD
    assert torch.allclose(vectors_mD[0], pairs.vector_D)
    assert torch.allclose(vectors_mD @ a @ vectors_mD.T, torch.diag(torch.from_numpy(pairs.values_m)), atol=1e-8)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_what_lies_beside_is_seen_in_every_product(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(8, 8, generator=g, dtype=torch.float64)
    operator, v_kD = DenseOperator(a + a.T), torch.randn(3, 8, generator=g, dtype=torch.float64)
    space = Subspace(operator, v_kD)
    for v in torch.randn(4, 8, generator=g, dtype=torch.float64):
        space.add(v)
    pairs = space.pairs()
    assert torch.allclose(torch.from_numpy(pairs.inside_km.copy()), v_kD @ space.basis_mD.T)
    assert torch.allclose(torch.from_numpy(pairs.images_km.copy()), v_kD @ (a + a.T) @ space.basis_mD.T)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_pairs_of_a_krylov_space_are_taken_with_their_images(seed: int, count: int) -> None:
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(12, 12, generator=g, dtype=torch.float64)
    operator, space = dense(a + a.T)
    *_, krylov = krylov_spaces(operator, torch.randn(12, generator=g, dtype=torch.float64), count)
    space.take(krylov, 3)
    assert (space.products, space.dimension) == (count, min(count, 3))
    values_k, _ = krylov.pairs()
    assert space.pairs().values_m.tolist() == pytest.approx(values_k[::-1][:3].tolist(), abs=1e-8)
    y_D = space.pairs().vector_D
    assert torch.allclose(space.pairs().residual_D, operator.matvec(y_D) - space.pairs().value * y_D, atol=1e-8)


def test_a_product_that_is_not_finite_leaves_no_pair() -> None:
    _, space = dense(torch.full((3, 3), torch.nan))
    assert space.add(torch.ones(3))
    assert math.isnan(space.pairs().value)
    operator, space = dense(torch.full((3, 3), torch.nan))
    *_, krylov = krylov_spaces(operator, torch.ones(3), 1)
    space.take(krylov, 3)
    assert math.isnan(space.pairs().value)


def test_products_of_the_hessian_are_products_of_the_preconditioned_one() -> None:
    class Remembering(DenseOperator):
        def known(self):  # type: ignore[no-untyped-def]
            return [(v, self.matvec(v)) for v in torch.eye(3, dtype=torch.float64)]

    g = torch.Generator().manual_seed(0)
    a = torch.randn(3, 3, generator=g, dtype=torch.float64)
    hessian, (d, c) = Remembering(a + a.T), torch.rand(2, 3, generator=g, dtype=torch.float64)
    operator = PreconditionedOperator(hessian, d, c)
    for v, image in operator.known():
        assert torch.allclose(operator.matvec(v), image)
    still = PreconditionedOperator(hessian, torch.tensor([1.0, 0, 1]).double(), c)
    assert len(still.known()) == 2, "not that along the coordinate which does not move"
    for v, image in still.known():
        assert torch.allclose(still.matvec(v), image)
    assert all(torch.equal(v, e) for (v, _), e in zip(hessian.known(), torch.eye(3).double(), strict=True))


@pytest.mark.parametrize(("optimizer", "free"), [(torch.optim.SGD, True), (torch.optim.Adam, False)])
def test_rho_of_sgd_costs_no_product_after_the_sharpness(optimizer: type, free: bool) -> None:
    built = build(BY_NAME["mlp"])
    opt = optimizer(built.model.parameters(), lr=0.1)
    readers = [Sharpness(), PreconditionedSharpness()]
    states = [reader.init() for reader in readers]
    audited: list[bool] = []
    free_of_cost: list[bool] = []
    for step in range(12):
        opt.zero_grad()
        x, y = built.batch
        built.loss(built.model(x), y).backward()
        held = HeldBatches([built.batch])
        products, values = [], []
        with Probe(built.model, as_objective(built.loss), [opt], [built.batch], step=step, held=held) as probe:
            for i, reader in enumerate(readers):
                view = View(probe, reader.needs)
                found, states[i] = reader.advance(view, states[i])
                products.append(view.meter.products)
                values.append(found)
        opt.step()
        audited.append(states[1]["since"] == 0)
        free_of_cost.append(products[1] == 0)
        assert products[0] > 0
        if free:
            assert float(values[1]["rho"]) == pytest.approx(0.05 * float(values[0]["sharpness"]), rel=0.02)
    assert audited == [i in (0, 1, 3, 7) for i in range(12)]
    assert free_of_cost == [free and not audit for audit in audited]
