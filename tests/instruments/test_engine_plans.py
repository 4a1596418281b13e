"""What the fused engine remembers of a graph holds for the next step, or is not remembered.

Shapes: N = examples, T = positions of an example.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_samples import EVERYTHING, assert_moments
from torch import Tensor, nn
from twins import example_gradients

from instruments import Probe, Refusal
from instruments.meter import Meter
from instruments.objective import as_objective
from instruments.samples.moments import SampleMoments

N = 6
CROSS_ENTROPY = nn.CrossEntropyLoss()
Plans = dict[Any, Any]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def read(model: nn.Module, loss: Any, batch: Any, plans: Plans) -> SampleMoments:
    with Probe(model, as_objective(loss), [], [batch], plans=plans) as probe:
        return probe.samples.moments(Meter(), EVERYTHING)


def assert_read_right(model: nn.Module, loss: Any, batch: Any, plans: Plans) -> None:
    assert_moments(read(model, loss, batch, plans), example_gradients(model, loss, batch))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def classes(*shape: int) -> Tensor:
    return torch.randint(3, shape)


def with_classes(call: Any, batch: Any) -> Tensor:
    """The last of the batch are the targets, what stands before is the model's."""
    return F.cross_entropy(call(batch[:-1]), batch[-1], reduction="none")


def by_position(call: Any, batch: Any) -> Tensor:
    """Mean over the positions, of which those with target -100 give zero."""
    return F.cross_entropy(call(batch[0]).transpose(1, 2), batch[1], reduction="none").mean(1)


class Tagger(nn.Module):
    """Linear layers on (N, T, width), or on (T, N, width) with positions first."""

    def __init__(self, *, positions_first: bool) -> None:
        super().__init__()
        self.positions_first = positions_first
        self.embed, self.inner, self.out = nn.Embedding(7, 5), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, tokens_NT: Tensor) -> Tensor:
        h = self.embed(tokens_NT)
        if self.positions_first:
            h = h.transpose(0, 1)
        out = self.out(torch.tanh(self.inner(h)))
        return out.transpose(0, 1) if self.positions_first else out


@pytest.mark.parametrize("positions_first", [False, True])
def test_every_length_of_the_sequence_is_right(positions_first: bool) -> None:
    model, plans = Tagger(positions_first=positions_first).double(), {}
    for length in (6, *range(1, 13), 6):
        assert_read_right(model, by_position, (torch.randint(7, (N, length)), classes(N, length)), plans)


def test_positions_that_become_the_first_dimension_are_noticed() -> None:
    """As many positions as examples: no shape tells the two graphs apart."""
    model, plans = Tagger(positions_first=False).double(), {}
    for model.positions_first in (False, True, False):
        assert_read_right(model, by_position, (torch.randint(7, (N, N)), classes(N, N)), plans)


class LowRank(nn.Module):
    """An adapter B A beside a frozen layer, sequence first; A has no gradient while B = 0."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.head = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 3).requires_grad_(False)
        self.a, self.switch = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.zeros(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.head(torch.tanh(self.base(x) + F.linear(F.linear(x, self.a), self.switch)).mean(0))


class Gated(nn.Module):
    """A branch that is added with a factor of its own, zero at first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.branch, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.switch = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.transpose(0, 1))
        return self.head((h + self.switch * torch.tanh(self.branch(h))).mean(0))


@pytest.mark.parametrize("kind", [LowRank, Gated])
def test_gradients_that_are_zero_at_first_are_not_remembered(kind: type[Any]) -> None:
    model, plans = kind().double(), {}
    batch = (normal(N, 4, 4), classes(N))
    assert_read_right(model, CROSS_ENTROPY, batch, plans)
    assert not plans["graphs"]
    nn.init.normal_(model.switch)
    assert_read_right(model, CROSS_ENTROPY, batch, plans)
    assert plans["graphs"]


def test_an_example_without_a_loss_leaves_nothing_to_remember() -> None:
    model, plans = Tagger(positions_first=True).double(), {}
    tokens, targets = torch.randint(7, (N, 5)), classes(N, 5)
    masked = targets.clone()
    masked[0] = -100
    assert_read_right(model, by_position, (tokens, masked), plans)
    assert not plans["graphs"]
    assert_read_right(model, by_position, (tokens, targets), plans)
    assert plans["graphs"]


class ByLength(nn.Module):
    """Sorts the examples by their length before a layer, and back before the next."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, length_N = batch
        order = length_N.argsort(descending=True)
        return self.out(torch.tanh(self.inner(x[order]))[order.argsort()])


def test_examples_that_the_data_reorders() -> None:
    model, plans = ByLength().double(), {}
    for lengths in ([9, 8, 7, 6, 5, 4], [4, 9, 7, 5, 6, 8], [5, 4, 9, 8, 6, 7]):
        assert_read_right(model, with_classes, (normal(N, 5), torch.tensor(lengths), classes(N)), plans)


def test_an_order_that_leaves_the_checked_examples_in_their_places() -> None:
    """The first, the middle and the last are looked at alone; here the second and the third change places."""
    batch = (normal(N, 5), torch.tensor([9, 7, 8, 6, 5, 4]), classes(N))
    assert_read_right(ByLength().double(), with_classes, batch, {})


class Mixing(nn.Module):
    """Each example gets a share of another's features, where `mixes`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out, self.mixes = nn.Linear(5, 8), nn.Linear(8, 3), False

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x))
        if self.mixes:
            h = 0.7 * h + 0.3 * h[torch.arange(len(h)).roll(2)]
        return self.out(h)


def test_mixing_that_is_switched_on_later_is_refused() -> None:
    model, plans = Mixing().double(), {}
    batch = (normal(N, 5), classes(N))
    assert_read_right(model, CROSS_ENTROPY, batch, plans)
    model.mixes = True
    with pytest.raises(Refusal, match="interact"):
        read(model, CROSS_ENTROPY, batch, plans)
