"""The rest of the table of test_pitfalls: what hooks, masks, precisions, steps and batches do to a reading."""

import copy
from typing import Any

import pytest
import torch
from test_last_resort import Fused
from test_pitfalls import CROSS_ENTROPY, hessian_of, probe_of, read, rows, same_weights
from torch import Tensor, nn
from twins import dense_hessian
from zoo import N

from instruments import Refusal
from instruments.curvature.sharpness import Sharpness
from instruments.meter import Meter


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def net(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), *between, nn.Linear(5, 3)).double()


# Hooks.


def test_a_mask_on_a_gradient_masks_rows_and_columns() -> None:
    model, batch = net(), rows()
    true_DD = dense_hessian(model, CROSS_ENTROPY, batch)
    mask = (torch.rand(5, 4) > 0.5).double()
    model[0].weight.register_hook(lambda grad: grad * mask)
    kept_D = torch.cat([mask.reshape(-1), torch.ones(len(true_DD) - 20, dtype=torch.float64)])
    hessian_DD, route, _ = hessian_of(model, batch)
    assert route == "double backward, graph kept"
    assert torch.allclose(hessian_DD, kept_D[:, None] * true_DD * kept_D, atol=1e-7)


def test_gradients_that_are_all_scaled_are_those_of_a_scaled_loss() -> None:
    """Twice backward meets the hook twice: 9 times the Hessian instead of 3."""
    model, batch = net(), rows()
    true_DD = dense_hessian(model, CROSS_ENTROPY, batch)
    for p in model.parameters():
        p.register_hook(lambda grad: 3 * grad)
    hessian_DD, route, error = hessian_of(model, batch)
    assert "a hook scales" in route
    assert error is not None
    assert (hessian_DD - 3 * true_DD).norm() < 1e-6 * true_DD.norm()
    with probe_of(model, batch) as probe, pytest.raises(Refusal, match="expected hooks on parameters that are masks"):
        probe.curvatures.gauss_newton(Meter())


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return -g


class Reversal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Reversal.apply(x)


def scaled_in_part() -> nn.Module:
    model = net()
    model[0].weight.register_hook(lambda grad: 0.1 * grad)
    return model


@pytest.mark.parametrize("make", [lambda: net(Reversal()), scaled_in_part], ids=["reversal", "scaled"])
@pytest.mark.parametrize("seed", range(3))
def test_directions_that_are_the_gradient_of_no_loss_are_refused(make: Any, seed: int) -> None:
    torch.manual_seed(seed)
    model, batch = make(), rows()
    with probe_of(model, batch) as probe, pytest.raises(Refusal, match="the gradient of none"):
        probe.curvatures.hessian(Meter())


# Layers.


class Bag(nn.Module):
    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.items, self.out = nn.EmbeddingBag(5, 3, sparse=sparse), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.items(x).tanh())


def test_sparse_bags() -> None:
    (sparse, plain), batch = same_weights(Bag(sparse=True), Bag(sparse=False)), (torch.randint(0, 5, (N, 2)), rows()[1])
    hessian_DD, route, error = hessian_of(sparse, batch)
    true_DD = dense_hessian(plain, CROSS_ENTROPY, batch)
    assert "last resort" in route
    assert error is not None
    assert (hessian_DD - true_DD).norm() < 1e-6 * true_DD.norm()


def test_in_place_activations() -> None:
    def net(*, inplace: bool) -> nn.Module:
        return nn.Sequential(
            nn.Linear(4, 8), nn.ReLU(inplace), nn.Linear(8, 6), nn.ELU(inplace=inplace), nn.Linear(6, 3)
        )

    (over, plain), batch = same_weights(net(inplace=True), net(inplace=False)), rows()
    true_DD = dense_hessian(plain, CROSS_ENTROPY, batch)
    assert (hessian_of(over, batch)[0] - true_DD).norm() < 1e-7 * true_DD.norm()


# Masks.


class Pinned(nn.Module):
    """The random numbers of every forward are those of one seed: what the probe's setting promises."""

    def __init__(self, inner: nn.Module, seed: int) -> None:
        super().__init__()
        self.inner, self.seed = inner, seed

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(self.seed)
        return self.inner(x)


def test_dropout_is_one_fixed_matrix_of_one_set_of_masks() -> None:
    model, batch = net(nn.Dropout(0.5)), rows()
    found_DD, _, _ = hessian_of(model, batch)
    one_DD, other_DD = (dense_hessian(Pinned(model, seed), CROSS_ENTROPY, batch) for seed in (0, 1))
    assert torch.allclose(found_DD, one_DD, atol=1e-7)
    assert not torch.allclose(found_DD, other_DD, atol=1e-3)


# Precisions.


class Autocast(nn.Module):
    """Autocast inside the forward, where switching it off outside has no effect."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(x).float()


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "autocast"])
def test_half_precision_says_what_it_costs(kind: str) -> None:
    """The eigenvalue is within its bound and the stated error of that of the same numbers in double precision."""
    model = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    x, y = rows()
    dtype = torch.float16 if kind == "float16" else torch.bfloat16
    if kind != "autocast":
        model, x = model.to(dtype), x.to(dtype)
    exact = copy.deepcopy(model).double()
    top = float(torch.linalg.eigvalsh(dense_hessian(exact, CROSS_ENTROPY, (x.double(), y)))[-1])
    half = Autocast(model) if kind == "autocast" else model
    batch = (x.float() if kind == "autocast" else x, y)
    values, _, provenance = read(Sharpness(tol=0.01), half, batch)
    assert provenance["route"].endswith(f"in part in {str(dtype).removeprefix('torch.')}")
    assert provenance["product_error"] == 16 * torch.finfo(dtype).eps
    assert abs(values["sharpness"] - top) <= values["bound"] + provenance["product_error"] * top
    assert values["converged"] == 1.0
    single, _, other = read(Sharpness(tol=0.01), copy.deepcopy(model).float(), (x.float(), y))
    assert "product_error" not in other
    assert single["sharpness"] == pytest.approx(top, rel=0.01)


def test_autocast_around_a_reading_changes_no_bit() -> None:
    model, batch = net().float(), (rows()[0].float(), rows()[1])
    plain, _, _ = read(Sharpness(), model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _, provenance = read(Sharpness(), model, batch)
    assert {k: v for k, v in inside.items() if v == v} == {k: v for k, v in plain.items() if v == v}
    assert provenance["route"] == "double backward, graph kept"


def test_autocast_comes_back_when_a_reading_cannot_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: nn.Module) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr("instruments.probe.untouched", broken)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(RuntimeError, match="planted"), probe_of(net(), rows()):
            pass
        assert torch.is_autocast_enabled("cpu")


# Steps.


def test_a_step_between_the_graph_and_the_product_is_refused() -> None:
    model, batch = net(), rows()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probe_of(model, batch) as probe:
        operator = probe.curvatures.hessian(Meter())
        v_D = torch.ones(operator.size, dtype=torch.float64)
        operator.matvec(v_D)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        with pytest.raises(Refusal, match="were written to since the graph was built"):
            operator.matvec(v_D)


@pytest.mark.parametrize(
    ("matrix", "fused"), [("hessian", False), ("hessian", True), ("gauss_newton", False), ("fisher", False)]
)
def test_an_operator_of_an_earlier_step_is_refused(matrix: str, fused: bool) -> None:
    """Its graphs are freed: a sum over none of them would be no number."""
    with probe_of(Fused(fused=fused).double(), rows()) as probe:
        operator = getattr(probe.curvatures, matrix)(Meter())
    with pytest.raises(ValueError, match="got one that was released"):
        operator.matvec(torch.ones(operator.size, dtype=torch.float64))


# Batches.


def test_small_batches_read_sharper_and_say_how_small_they_are() -> None:
    """Jensen: the largest eigenvalue of a mean is at most the mean of the largest eigenvalues of its parts."""
    model = net()
    x, y = torch.randn(64, 4, dtype=torch.float64), torch.randint(0, 3, (64,))
    whole, _, provenance = read(Sharpness(tol=1e-3), model, (x, y))
    assert provenance["examples"] == 64
    parts = []
    for i in range(0, 64, 8):
        values, _, provenance = read(Sharpness(tol=1e-3), model, (x[i : i + 8], y[i : i + 8]))
        assert provenance["examples"] == 8
        parts.append(values["sharpness"])
    assert sum(parts) / 8 > 1.1 * whole["sharpness"]


def test_kinks_under_differences_show_in_the_reading() -> None:
    """No second derivative and rectifiers: the reading says that its products are not to be trusted."""

    class Kinked(Fused):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(super().forward(x)))

    smooth = nn.Sequential(Fused(fused=True)).float()
    kinked = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4), *smooth)
    x, y = torch.randn(64, 4), torch.randint(0, 3, (64,))
    errors = [read(Sharpness(), model, (x, y))[2]["product_error"] for model in (smooth, kinked)]
    assert errors[0] < 0.02 < 0.1 < errors[1]
