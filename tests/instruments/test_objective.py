"""Losses taken apart by example are the losses that torch computes; batches and layouts are counted right."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, build
from torch import Tensor, nn
from twins import total_loss

from instruments import Refusal
from instruments.held import HeldBatches
from instruments.layout import Layout
from instruments.objective import as_objective, bytes_of, clone_of, examples_of, pooled_loss


@pytest.mark.parametrize("case", [c for c in CASES if not c.random], ids=lambda case: case.name)
def test_the_parts_are_the_loss(case: Case) -> None:
    built = build(case)
    parts = as_objective(built.loss).parts(built.model, built.batch)
    assert torch.allclose(parts.loss, total_loss(built.model, built.loss, built.batch), rtol=1e-12)
    assert parts.sums_N is not None
    assert parts.sums_N.shape == (6,)
    assert torch.allclose(parts.sums_N.sum(), parts.total)


SHAPED = [
    (nn.MSELoss, (5, 3, 2)), (nn.L1Loss, (5, 3)), (nn.SmoothL1Loss, (5,)), (nn.HuberLoss, (5, 2)),
    (nn.BCEWithLogitsLoss, (5, 3)), (nn.SoftMarginLoss, (5, 2)),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "shape"), SHAPED)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_modules_of_torch_with_both_reductions(cls: Any, shape: tuple[int, ...], reduction: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(shape, dtype=torch.float64), torch.rand(shape, dtype=torch.float64).round()
    loss = cls(reduction=reduction)
    parts = as_objective(loss).parts(lambda inputs: inputs, (x, y))
    assert torch.allclose(parts.loss, loss(x, y))
    assert parts.examples == 5
    assert loss.reduction == reduction


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
def test_divergences_are_divided_as_torch_divides_them(reduction: str) -> None:
    x, y = torch.rand(4, 3).log_softmax(1), torch.rand(4, 3).softmax(1)
    loss = nn.KLDivLoss(reduction=reduction)
    assert torch.allclose(as_objective(loss).parts(lambda inputs: inputs, (x, y)).loss, loss(x, y))


def test_probability_targets_and_all_ignored_targets() -> None:
    x = torch.randn(4, 3)
    soft = torch.rand(4, 3).softmax(1)
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    assert torch.allclose(as_objective(loss).parts(lambda inputs: inputs, (x, soft)).loss, loss(x, soft))
    ignored = torch.full((4,), -100)
    assert torch.isnan(as_objective(nn.CrossEntropyLoss()).parts(lambda inputs: inputs, (x, ignored)).loss)


def test_a_module_of_the_users_own_may_return_losses_or_a_number() -> None:
    class Own(nn.Module):
        def __init__(self, mean: bool) -> None:
            super().__init__()
            self.mean = mean

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            losses = (outputs - targets).abs().sum(1)
            return losses.mean() if self.mean else losses

    x, y = torch.randn(4, 3), torch.randn(4, 3)
    alone, number = (as_objective(Own(mean)).parts(lambda i: i, (x, y)) for mean in (False, True))
    assert torch.allclose(alone.loss, number.loss)
    assert number.sums_N is None
    assert number.examples == 4


def test_losses_of_positions_are_averaged() -> None:
    x = torch.randn(4, 3)
    parts = as_objective(lambda call, b: call(b).square()).parts(lambda i: i, x)
    assert torch.allclose(parts.loss, x.square().mean())


def test_unequal_batches_pool_by_their_denominators_and_sums_by_examples() -> None:
    x, y = torch.randn(6, 3), torch.randint(0, 3, (6,))
    for loss, expected in (
        (nn.CrossEntropyLoss(), F.cross_entropy(x, y)),
        (nn.CrossEntropyLoss(reduction="sum"), None),
    ):
        objective = as_objective(loss)
        parts = [objective.parts(lambda i: i, b) for b in ((x[:4], y[:4]), (x[4:], y[4:]))]
        if expected is None:  # sums over batches are averaged, each weighing its examples
            expected = (4 * F.cross_entropy(x[:4], y[:4], reduction="sum") + 2 * parts[1].loss) / 6
        assert torch.allclose(pooled_loss(objective, parts), expected)


@pytest.mark.parametrize(
    ("loss", "message"),
    [(F.cross_entropy, r"nn\.CrossEntropyLoss\(\)"), (nn.CTCLoss(), "lengths"), ("mse", "expected an nn loss module")],
)
def test_mistakes_are_named(loss: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_objective(loss)


@pytest.mark.parametrize("batch", [{"x": torch.ones(2)}, torch.ones(2), (torch.ones(2),)])
def test_a_loss_module_wants_pairs(batch: Any) -> None:
    with pytest.raises(Refusal, match="losses"):
        as_objective(nn.MSELoss()).parts(lambda i: i, batch)


def test_examples_bytes_and_clones() -> None:
    x, y = torch.ones(4, 3), torch.zeros(4)
    assert examples_of((x, y)) == examples_of({"x": x, "n": 7}) == examples_of([x[:1], x[:3], x[:2], x]) == 4
    assert bytes_of({"x": x, "deep": [y]}) == 64
    copy = clone_of((x, {"y": y}))
    x.fill_(5)
    assert float(copy[0].sum()) == 12


def test_held_batches_are_collected_whole_until_they_are_full() -> None:
    held = HeldBatches()
    x = torch.ones(200, 2)
    for _ in range(4):
        held.offer([(x, x)])
    assert (held.examples, held.complete, len(held.batches)) == (400, True, 2)
    large = HeldBatches()
    large.offer([torch.ones(600, 1)])
    assert (large.examples, large.complete) == (600, True)
    with pytest.raises(ValueError, match="at least one example"):
        HeldBatches([])


def test_the_layout_counts_tied_and_skips_frozen_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.Linear(2, 1))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    layout = Layout.of(model)
    assert layout.names == ("0.weight", "2.bias")
    assert layout.size == 5
    v_D = torch.arange(5.0)
    assert torch.equal(layout.join(layout.split(v_D)), v_D)
    assert torch.equal(layout.join([None, torch.ones(1)]), torch.tensor([0.0, 0, 0, 0, 1]))
    with pytest.raises(ValueError, match="trainable parameters"):
        Layout.of(model.requires_grad_(False))
