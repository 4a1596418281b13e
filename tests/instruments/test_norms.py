"""Norms of lists of tensors: exact for large ones, for any layout, and one number a tensor."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from instruments.layout import PIECE, norms_of, total_norm


def slow(t: Tensor) -> float:
    return float((t.to_dense().double().flatten() ** 2).sum()) ** 0.5


LARGE = 12 * PIECE
SHAPES: dict[str, Callable[[], Tensor]] = {
    "large": lambda: torch.randn(LARGE),
    "constant": lambda: torch.full((LARGE // 4, 4), 1e-3),
    "one long row": lambda: torch.randn(1, PIECE + 1),
    "long rows": lambda: torch.randn(3, 2 * PIECE),
    "channels last": lambda: torch.randn(PIECE // 64, 64, 3, 3).to(memory_format=torch.channels_last),
    "expanded": lambda: torch.randn(2 * PIECE, 1).expand(-1, 3),
    "transposed": lambda: torch.randn(700, 1000).t(),
    "one number": lambda: torch.tensor(-2.0),
    "nothing": lambda: torch.zeros(0, 3),
    "half": lambda: torch.randn(2 * PIECE).bfloat16(),
    "double": lambda: torch.randn(2 * PIECE).double(),
}


@pytest.mark.parametrize("name", SHAPES)
def test_norms_against_double_precision(name: str) -> None:
    torch.manual_seed(0)
    t, other = SHAPES[name](), torch.tensor([3.0, 4.0])
    assert norms_of([t, other]).tolist() == pytest.approx([slow(t), 5.0], rel=1e-4)
    assert float(total_norm([None, t, other])) == pytest.approx((slow(t) ** 2 + 25) ** 0.5, rel=1e-4)


def test_infinities_and_no_numbers_come_through() -> None:
    t = torch.ones(3 * PIECE)
    t[-1] = float("inf")
    assert norms_of([t]).tolist() == [float("inf")]
    t[0] = float("nan")
    assert norms_of([t]).isnan().all()


def test_a_sparse_gradient_with_repeated_rows_counts_their_sum() -> None:
    t = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.tensor([[3.0], [1.0]]), (4, 1), check_invariants=True)
    assert float(total_norm([t])) == 4.0
