"""Curvature along gradient and step, against the dense Hessian."""

from typing import Any

import pytest
import torch
from taking import SOME, case, take
from torch import Tensor, nn, optim
from twins import dense_hessian, total_loss, trainable

from instruments.curvature.directional import Directional
from instruments.layout import Layout
from instruments.preconditioners import read_preconditioner


def gradient(built: Any) -> Tensor:
    params = list(trainable(built.model).values())
    loss = total_loss(built.model, built.loss, built.batch)
    grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
    return torch.cat([g.reshape(-1) for g in grads])


def along(h_DD: Tensor, d_D: Tensor) -> float:
    return float(d_D @ h_DD @ d_D / (d_D @ d_D))


@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam])
@pytest.mark.parametrize("name", SOME)
def test_it_is_that_of_the_dense_hessian(name: str, kind: Any) -> None:
    built = case(name)
    optimizer = kind(built.model.parameters(), lr=0.01)
    h_DD, g_D = dense_hessian(built.model, built.loss, built.batch), gradient(built)
    values, _, _ = take(Directional(), built, [optimizer])
    assert float(values["along_gradient"]) == pytest.approx(along(h_DD, g_D), rel=1e-4, abs=1e-7)
    layout = Layout.of(built.model)
    scale_D = read_preconditioner([optimizer], layout, [p.grad for p in layout.params]).scale_D
    step_D = scale_D * g_D
    assert float(values["along_step"]) == pytest.approx(along(h_DD, step_D), rel=1e-4, abs=1e-7)
    ratio = float(step_D @ h_DD @ step_D / (2 * g_D @ step_D))
    assert float(values["ratio"]) == pytest.approx(ratio, rel=1e-4, abs=1e-7)


def test_gradient_descent_sees_one_direction_and_its_own_edge() -> None:
    built = case("mlp")
    fast, _, _ = take(Directional(), built, [optim.SGD(built.model.parameters(), lr=0.5)])
    assert float(fast["along_step"]) == pytest.approx(float(fast["along_gradient"]))
    assert float(fast["ratio"]) == pytest.approx(0.5 / 2 * float(fast["along_gradient"]))
    h_DD, g_D = dense_hessian(built.model, built.loss, built.batch), gradient(built)
    step_D = -0.5 * g_D
    gain = float(-(g_D @ step_D))
    taken_back = float(step_D @ h_DD @ step_D) / 2
    assert float(fast["ratio"]) == pytest.approx(taken_back / gain, rel=1e-4)


def test_an_unknown_optimizer_leaves_the_gradient() -> None:
    built = case("mlp")
    values, _, provenance = take(Directional(), built, [optim.Rprop(built.model.parameters())])
    assert float(values["along_gradient"]) == pytest.approx(
        along(dense_hessian(built.model, built.loss, built.batch), gradient(built)), rel=1e-4
    )
    assert values["along_step"] != values["along_step"]
    assert "Rprop" in provenance["step"]


def test_a_zero_gradient_has_no_direction() -> None:
    built = case("mlp_squared")
    with torch.no_grad():
        nn.init.zeros_(built.model[2].weight)
        nn.init.zeros_(built.model[2].bias)
    built.batch[1].zero_()
    values, _, _ = take(Directional(), built, [optim.SGD(built.model.parameters(), lr=0.1)])
    assert all(torch.isnan(torch.as_tensor(value)) for value in values.values())
