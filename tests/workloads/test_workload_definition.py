"""Data, batches, fingerprints, evaluation: the parts every workload shares."""

from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from workloads.evaluation import classification
from workloads.target import at_least
from workloads.workload import Data, Workload, fingerprint, hashed

ROWS = torch.arange(10)
DATA = hashed((ROWS, ROWS + 100), (ROWS, ROWS))
TINY = Workload(
    name="tiny",
    summary="Ten numbers.",
    load=lambda: DATA,
    make_model=lambda data: nn.Identity(),
    loss=nn.MSELoss(),
    evaluate=lambda model, valid: {"valid_loss": 0.0},
    target=lambda data: at_least("valid_loss", 0.0),
    batch_size=4,
    steps=10,
    evaluate_every=5,
    baselines={"sgd": {"lr": 0.1}},
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def take(workload: Workload, seed: int, count: int) -> list[tuple[Tensor, ...]]:
    return list(islice(workload.batches(DATA, generator=generator(seed)), count))


def test_batches_follow_their_generator_alone() -> None:
    before = torch.get_rng_state()
    first = take(TINY, 0, 6)
    torch.rand(3)
    assert all(
        torch.equal(a, b) for x, y in zip(first, take(TINY, 0, 6), strict=True) for a, b in zip(x, y, strict=True)
    )
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(first, take(TINY, 1, 6), strict=True))
    torch.set_rng_state(before)
    take(TINY, 0, 6)
    assert torch.equal(before, torch.get_rng_state())


def test_an_epoch_has_whole_batches_without_repeats_and_the_next_another_order() -> None:
    batches = take(TINY, 0, 4)
    assert all(len(inputs) == 4 and torch.equal(inputs + 100, targets) for inputs, targets in batches)
    epochs = [torch.cat([batches[0][0], batches[1][0]]), torch.cat([batches[2][0], batches[3][0]])]
    assert all(len(epoch.unique()) == 8 for epoch in epochs)
    assert not torch.equal(*epochs)


def test_fewer_examples_than_a_batch_are_refused_before_the_first_batch() -> None:
    with pytest.raises(ValueError, match=r"at least one batch of 11 examples, got 10; use a smaller batch_size"):
        replace(TINY, batch_size=11).batches(DATA, generator=generator(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a b"}, "expected a module's name, got 'a b'"),
        ({"summary": "two\nlines"}, "summary of one line"),
        ({"load": DATA}, "load to be callable"),
        ({"batch_size": 0}, "batch_size >= 1, got 0"),
        ({"steps": 0}, "steps >= 1, got 0"),
        ({"evaluate_every": 11}, "evaluate_every <= steps = 10, got 11"),
        ({"baselines": {"sgdd": {"lr": 1.0}}}, "expected a baseline for one of sgd, .* got 'sgdd'"),
        ({"baselines": {"adam": {}}}, "finite lr > 0 in the baseline of adam"),
        ({"baselines": {"adam": {"lr": float("nan")}}}, "finite lr > 0 in the baseline of adam"),
    ],
)
def test_fields_that_cannot_be_meant_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_examples_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected train tensors .* got \[10, 9\]"):
        Data((ROWS, ROWS[1:]), (ROWS,), "", {})
    with pytest.raises(ValueError, match="expected valid tensors"):
        Data((ROWS,), (), "", {})


def test_fingerprint_sees_values_shapes_types_and_order_but_not_layout() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    others = [x + 1, x.reshape(3, 2), x.to(torch.float64), x.view(torch.int32)]
    assert len({fingerprint(tensor) for tensor in [x, *others]}) == 5
    assert fingerprint(x, x + 1) != fingerprint(x + 1, x)
    assert fingerprint(x) == fingerprint(x.T.contiguous().T)
    assert hashed((x,), (x,)).sha256 == fingerprint(x, x)


def test_evaluation_in_chunks_is_the_formula_and_restores_every_flag() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 4))
    model[2].eval()
    flags = [module.training for module in model.modules()]
    inputs, targets = torch.randn(10, 3), torch.randint(4, (10,))
    state, before = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}

    metrics = classification(model, (inputs, targets), chunk=3)

    assert [module.training for module in model.modules()] == flags
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.eval()
    logits = model(inputs)
    expected = -torch.stack([logits[i].log_softmax(0)[targets[i]] for i in range(10)]).mean()
    assert metrics["valid_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["valid_accuracy"] == sum(int(logits[i].argmax() == targets[i]) for i in range(10)) / 10


def test_flags_come_back_when_evaluation_fails() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(RuntimeError):
        classification(model, (torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)))
    assert all(module.training for module in model.modules())
