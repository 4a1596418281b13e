"""The Gauss-Newton operator against J'HJ from finite differences and closed forms, on every case of the table."""

import gc
import weakref
from typing import Any, get_args

import pytest
import torch
from cases import BY_NAME, CASES, Built, Case, build
from gauss_newton_twin import dense_gauss_newton, matrix_of, pinned
from torch import Tensor, nn
from twins import dense_hessian, flat_loss

from instruments.guard import untouched
from instruments.layout import Layout
from instruments.objective import addends, as_objective
from instruments.operators.gauss_newton import GaussNewtonOperator, Products
from instruments.refusal import Refusal

WAYS = get_args(Products)
# Forward mode loads decompositions that torch itself still scripts.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


def gauss_newton(model: nn.Module, loss: Any, batches: list[Any], products: Products = "kept") -> GaussNewtonOperator:
    objective = as_objective(loss)

    def piece(batch: Any) -> Any:
        return lambda call: addends(objective, objective.parts(call, batch))

    return GaussNewtonOperator(model, [piece(b) for b in batches], Layout.of(model), products=products, context=pinned)


def of(built: Built, products: Products = "kept") -> GaussNewtonOperator:
    return gauss_newton(built.model, built.loss, [built.batch], products)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_way_equals_the_definition(case: Case) -> None:
    built = build(case)
    expected = dense_gauss_newton(built)
    assert float(expected.abs().max()) > 1e-3
    for products in WAYS:
        with untouched(built.model):
            measured = matrix_of(of(built, products))
        assert torch.allclose(measured, expected, atol=1e-7 * (1 + float(expected.abs().max()))), products
        assert torch.allclose(measured, measured.T, atol=1e-12)
        assert float(torch.linalg.eigvalsh(measured)[0]) > -1e-10


@pytest.mark.parametrize("products", WAYS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_products_repeat_bit_for_bit(case: Case, products: Products) -> None:
    built = build(case)
    with untouched(built.model):
        operator = of(built, products)
        v_D = torch.randn(operator.size, dtype=torch.float64)
        assert torch.equal(operator.matvec(v_D), operator.matvec(v_D))


def test_it_is_the_hessian_of_a_linear_model_and_not_of_another() -> None:
    torch.manual_seed(0)
    batch = (torch.randn(6, 4, dtype=torch.float64), torch.randint(0, 3, (6,)))
    loss = nn.CrossEntropyLoss()
    linear = nn.Linear(4, 3).double()
    assert torch.allclose(matrix_of(gauss_newton(linear, loss, [batch])), dense_hessian(linear, loss, batch), atol=1e-7)
    built = build(BY_NAME["mlp"])
    hessian = dense_hessian(built.model, built.loss, built.batch)
    assert not torch.allclose(matrix_of(of(built)), hessian, atol=1e-2)


@pytest.mark.parametrize("products", WAYS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [True, False])
def test_unequal_batches_weigh_as_for_the_hessian(reduction: str, weighted: bool, products: Products) -> None:
    """Batches of 4 and 2. A mean: the matrix of the 6 together. A sum: the average by examples."""
    built = build(BY_NAME["mlp"])
    weight = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64) if weighted else None
    loss = nn.CrossEntropyLoss(weight=weight, reduction=reduction)
    x, y = built.batch
    parts = [(x[:4], y[:4]), (x[4:], y[4:])]
    measured = matrix_of(gauss_newton(built.model, loss, parts, products))
    if reduction == "mean":
        expected = dense_gauss_newton(Built(built.model, loss, built.batch))
    else:
        first, second = (dense_gauss_newton(Built(built.model, loss, part)) for part in parts)
        expected = (4 * first + 2 * second) / 6
    assert torch.allclose(measured, expected, atol=1e-7)


@pytest.mark.parametrize("products", WAYS)
def test_gradient_is_that_of_the_same_loss(products: Products) -> None:
    built = build(BY_NAME["tied_attention"])
    f, theta_D = flat_loss(built.model, built.loss, built.batch)
    theta_D.requires_grad_()
    expected = torch.autograd.grad(f(theta_D), theta_D)[0]
    assert torch.allclose(of(built, products).gradient_D, expected, atol=1e-12)


class Heads(nn.Module):
    """Returns a tree of tensors, one of integers and one without a gradient among them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.body(x))
        return {"a": self.a(h), "rest": (x.argmax(1), [self.b(h)], x.sum())}


def heads_loss(call: Any, batch: Any) -> Tensor:
    out = call(batch)
    a, (top, (b,), _) = out["a"], out["rest"]
    return a.square().sum(1) * 0.5 + nn.functional.cross_entropy(b, top % 3, reduction="none") + (a.prod(1) ** 2)


@pytest.mark.parametrize("products", WAYS)
def test_output_may_be_a_tree(products: Products) -> None:
    """Against a model that returns one tensor, and its loss of that tensor."""
    torch.manual_seed(0)
    model, x = Heads().double(), torch.randn(5, 4, dtype=torch.float64)

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = model

        def forward(self, x: Tensor) -> Tensor:
            out = self.heads(x)
            return torch.cat([out["a"], out["rest"][1][0]], 1)

    def joined_loss(call: Any, batch: Any) -> Tensor:
        z = call(batch)
        return heads_loss(lambda b: {"a": z[:, :2], "rest": (b.argmax(1), [z[:, 2:]], b.sum())}, batch)

    params = dict(model.named_parameters())

    def outputs(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(Joined(), {f"heads.{n}": p for n, p in values.items()}, (x,))

    jacobians = torch.func.jacrev(outputs)({n: p.detach() for n, p in params.items()})
    j = torch.cat([t.reshape(25, -1) for t in jacobians.values()], 1)
    z = outputs(params).detach()
    h = torch.func.hessian(lambda z: joined_loss(lambda b: z, x).mean())(z).reshape(25, 25)
    assert torch.allclose(matrix_of(gauss_newton(model, heads_loss, [x], products)), j.T @ h @ j, atol=1e-12)


@pytest.mark.parametrize("products", WAYS)
def test_two_calls_side_by_side_are_one_output(products: Products) -> None:
    """A contrastive loss: the same as one call on both inputs stacked."""
    built = build(BY_NAME["mlp"])
    x = built.batch[0]

    def apart(call: Any, batch: Any) -> Tensor:
        return (call(batch) * call(batch.flip(0))).sum(1).exp()

    def together(call: Any, batch: Any) -> Tensor:
        one, other = call(torch.cat([batch, batch.flip(0)])).chunk(2)
        return (one * other).sum(1).exp()

    measured = matrix_of(gauss_newton(built.model, apart, [x], products))
    assert torch.allclose(measured, matrix_of(gauss_newton(built.model, together, [x])), atol=1e-12)


@pytest.mark.parametrize("products", WAYS)
def test_a_loss_may_overwrite_the_output(products: Products) -> None:
    built = build(BY_NAME["mlp"])

    def overwriting(call: Any, batch: Any) -> Tensor:
        return call(batch).sub_(1.0).square_().sum(1)

    def plain(call: Any, batch: Any) -> Tensor:
        return (call(batch) - 1.0).square().sum(1)

    x = built.batch[0]
    measured = matrix_of(gauss_newton(built.model, overwriting, [x], products))
    assert torch.allclose(measured, matrix_of(gauss_newton(built.model, plain, [x])), atol=1e-14)


class Opaque:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Wrapping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Opaque:
        return Opaque(self.layer(x))


@pytest.mark.parametrize("products", WAYS)
def test_losses_that_cannot_be_cut_at_the_output_are_refused(products: Products) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
    x = torch.randn(5, 4, dtype=torch.float64)

    def penalised(call: Any, batch: Any) -> Tensor:
        return call(batch).square().sum(1) + model[0].weight.square().sum()

    def held(call: Any, batch: Any) -> Tensor:
        return model(batch).square().sum(1)

    def chained(call: Any, batch: Any) -> Tensor:
        return call(call(batch)).square().sum(1)

    def inside(call: Any, batch: Any) -> Tensor:
        return call.encode(batch).square().sum(1)

    for loss, reason in [
        (penalised, "parameter '0.weight'"),
        (held, "held by the loss function"),
        (chained, "calls the model on what another call returned"),
        (inside, "uses 'encode' of the model"),
    ]:
        with pytest.raises(Refusal, match=reason):
            gauss_newton(model, loss, [x], products).matvec(torch.ones(20, dtype=torch.float64))
    opaque = Wrapping().double()
    with pytest.raises(Refusal, match="cannot look into"):
        gauss_newton(opaque, lambda call, b: call(b).logits.square().sum(1), [x], products).matvec(
            torch.ones(15, dtype=torch.float64)
        )


@pytest.mark.parametrize("products", WAYS)
def test_a_call_on_a_detached_output_is_no_chain(products: Products) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
    x = torch.randn(5, 4, dtype=torch.float64)

    def bootstrapped(call: Any, batch: Any) -> Tensor:
        with torch.no_grad():
            target = call(batch)
        return (call(batch.flip(0)) - target).square().sum(1)

    target = model(x).detach()

    def plain(call: Any, batch: Any) -> Tensor:
        return (call(batch.flip(0)) - target).square().sum(1)

    measured = matrix_of(gauss_newton(model, bootstrapped, [x], products))
    assert torch.allclose(measured, matrix_of(gauss_newton(model, plain, [x])), atol=1e-14)


@pytest.mark.parametrize("products", WAYS)
def test_a_loss_linear_in_the_output_has_none(products: Products) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    operator = gauss_newton(model, lambda call, batch: call(batch).sum(1), [x], products)
    assert torch.equal(operator.matvec(torch.ones(20, dtype=torch.float64)), torch.zeros(20, dtype=torch.float64))


@pytest.mark.parametrize("products", ["kept", "rebuilt"])
def test_sparse_embedding_gradients_are_made_dense(products: Products) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Tanh(), nn.Linear(6, 3)).double()
    batch = (torch.randint(0, 5, (6, 2)), torch.randint(0, 3, (6,)))
    measured = matrix_of(gauss_newton(model, nn.CrossEntropyLoss(), [batch], products))
    with pytest.raises(Refusal, match="Embedding '0' has sparse gradients"):
        gauss_newton(model, nn.CrossEntropyLoss(), [batch], "forward")
    model[0].sparse = False
    assert torch.allclose(measured, dense_gauss_newton(Built(model, nn.CrossEntropyLoss(), batch)), atol=1e-7)


class Squared(torch.autograd.Function):
    """An operation without a forward-mode rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0]


def test_no_forward_rule_is_refused_by_forward_mode_alone() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return Squared.apply(self.layer(x))

    torch.manual_seed(0)
    model = Model().double()
    batch = (torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64))
    expected = dense_gauss_newton(Built(model, nn.MSELoss(), batch))
    for products in ("kept", "rebuilt"):
        measured = matrix_of(gauss_newton(model, nn.MSELoss(), [batch], products))
        assert torch.allclose(measured, expected, atol=1e-7)
    with pytest.raises(Refusal, match='products="kept"'):
        gauss_newton(model, nn.MSELoss(), [batch], "forward").matvec(torch.ones(15, dtype=torch.float64))


def test_nothing_is_left_behind() -> None:
    """No gradient on the parameters; released graphs are gone at once, without a garbage collection."""
    built = build(BY_NAME["mlp"])
    gc.disable()
    try:
        operator = of(built)
        operator.matvec(torch.ones(operator.size, dtype=torch.float64))
        assert all(p.grad is None for p in built.model.parameters())
        assert operator._graphs is not None
        outputs = weakref.ref(operator._graphs[0].jacobian._outputs[0])
        assert outputs() is not None
        operator.release()
        assert outputs() is None
    finally:
        gc.enable()


def test_products_are_named() -> None:
    built = build(BY_NAME["mlp"])
    with pytest.raises(ValueError, match="expected products to be one of kept, rebuilt, forward"):
        of(built, "double")  # type: ignore[arg-type]
