"""Gradients of a convolution that several read: as they are where they are small, as factors where they are not."""

import pytest
import torch
from torch import Tensor, nn

from instruments.samples.factors import Convolved, Direct, Statistics
from instruments.samples.problem import Wants

ONCE = ([1, 1], [1, 1], [1, 1], False, [0, 0])  # stride, padding, dilation, not transposed, output padding
EVERYTHING: Wants = frozenset({"second_moment", "inner_products", "gram"})


def convolved(channels: int, width: int) -> Convolved:
    generator = torch.Generator().manual_seed(0)

    def drawn(c: int) -> Tensor:
        return torch.randn(5, 1, c, width, width, generator=generator, dtype=torch.float64)

    return Convolved(drawn(channels), drawn(channels), (channels, channels, 3, 3), 1, ONCE)


def rows_of(made: Convolved) -> Tensor:
    """Twin: one backward pass an example."""
    weight = torch.zeros(made.shape, dtype=torch.float64, requires_grad=True)
    rows = []
    for x, delta in zip(made.inputs, made.deltas, strict=True):
        total = (nn.functional.conv2d(x, weight, padding=1) * delta).sum()
        rows.append(torch.autograd.grad(total, weight)[0].flatten())
    return torch.stack(rows)


@pytest.mark.parametrize(("channels", "width", "small"), [(2, 8, True), (9, 2, False)])
def test_gradients_are_formed_where_they_are_small(channels: int, width: int, small: bool) -> None:
    made = convolved(channels, width)
    formed, twin_ND = made.formed(), rows_of(made)
    assert isinstance(formed, Direct) if small else formed is made
    direction = torch.linspace(-1, 1, twin_ND.shape[1], dtype=torch.float64).view(made.shape)
    expected = Statistics(
        twin_ND.square().sum(1), twin_ND.square().sum(0), twin_ND @ direction.flatten(), twin_ND @ twin_ND.T
    )
    for factor in (made, formed):
        found = factor.statistics(EVERYTHING, direction)
        for name in ("norms_sq_N", "squares_d", "inner_N", "gram_NN"):
            torch.testing.assert_close(getattr(found, name).flatten(), getattr(expected, name).flatten())
        torch.testing.assert_close(factor.along(direction), twin_ND @ direction.flatten())
        torch.testing.assert_close(factor.rows(slice(1, 3)).flatten(1), twin_ND[1:3])
