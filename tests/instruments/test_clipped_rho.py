"""rho of a step whose gradient is clipped between observe and the step, against dense matrices of what torch does."""

from typing import Any

import pytest
import torch
from taking import case, take
from torch import Tensor, nn, optim
from twins import dense_hessian

from instruments import Probe, View
from instruments.curvature.preconditioned_sharpness import PreconditionedSharpness
from instruments.layout import Layout
from instruments.objective import as_objective
from instruments.preconditioners import Preconditioner, read_preconditioner


def warmed(make: Any, **settings: Any) -> tuple[Any, Any]:
    """A model with a gradient in `.grad` and an optimizer that has taken three steps on it, put back."""
    built = case("mlp")
    optimizer = make(built.model.parameters(), lr=0.05, **settings)
    start = [p.detach().clone() for p in built.model.parameters()]
    for _ in range(3):
        optimizer.step()
    with torch.no_grad():
        for p, p0 in zip(built.model.parameters(), start, strict=True):
            p.copy_(p0)
    return built, optimizer


def rho_of(h_DD: Tensor, p: Preconditioner) -> float:
    root_D = p.scale_D.sqrt()
    return float(torch.linalg.eigvalsh(root_D[:, None] * (h_DD + torch.diag(p.decay_D)) * root_D)[-1]) / 2


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (optim.SGD, {"momentum": 0.9}),
        (optim.SGD, {"weight_decay": 0.5}),
        (optim.Adam, {"betas": (0.9, 0.5), "weight_decay": 0.1}),
        (optim.AdamW, {"betas": (0.5, 0.9)}),
    ],
)
def test_it_is_that_of_the_gradient_as_torch_clips_it(make: Any, settings: dict[str, Any]) -> None:
    built, optimizer = warmed(make, **settings)
    layout, h_DD = Layout.of(built.model), dense_hessian(built.model, built.loss, built.batch)
    norm = float(torch.cat([p.grad.reshape(-1) for p in layout.params]).norm())
    values, _, provenance = take(PreconditionedSharpness(tol=1e-6, clip=0.3 * norm), built, [optimizer])
    assert values["rho"] == pytest.approx(
        rho_of(h_DD, read_preconditioner([optimizer], layout, grads(layout))), rel=1e-4
    )
    nn.utils.clip_grad_norm_(built.model.parameters(), 0.3 * norm)
    expected = rho_of(0.3 * h_DD, read_preconditioner([optimizer], layout, grads(layout)))
    assert values["rho_clipped"] == pytest.approx(expected, rel=1e-4)
    assert abs(values["rho_clipped"] / values["rho"] - 1) > 0.01
    assert provenance["clipped"].startswith("rho_clipped: by 0.3, to ")


def grads(layout: Layout) -> list[Tensor | None]:
    return [p.grad for p in layout.params]


def test_gradient_descent_shortens_rho_by_what_is_left_and_at_no_product() -> None:
    built, optimizer = warmed(optim.SGD)
    norm = float(torch.cat([p.grad.reshape(-1) for p in built.model.parameters()]).norm())
    products = []
    for clip in (None, 0.25 * norm):
        instrument = PreconditionedSharpness(clip=clip)
        with Probe(built.model, as_objective(built.loss), [optimizer], [built.batch]) as probe:
            view = View(probe, instrument.needs)
            values, _ = instrument.advance(view, instrument.init())
            products.append(view.meter.products)
    assert values["rho_clipped"] == pytest.approx(0.25 * float(values["rho"]), rel=1e-3)
    assert products[0] == products[1] > 0


@pytest.mark.parametrize("clip", [None, 1e6])
def test_without_clipping_it_is_rho(clip: float | None) -> None:
    built, optimizer = warmed(optim.Adam)
    values, _, provenance = take(PreconditionedSharpness(clip=clip), built, [optimizer])
    assert values["rho_clipped"] == values["rho"]
    assert provenance["clipped"].startswith("unknown" if clip is None else "no, the norm is within")


def test_what_is_no_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="expected clip to be the norm, above 0"):
        PreconditionedSharpness(clip=0.0)


def test_only_clipping_needs_the_gradient() -> None:
    assert "gradient" not in PreconditionedSharpness().needs
    assert "gradient" in PreconditionedSharpness(clip=1.0).needs
