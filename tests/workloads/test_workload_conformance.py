"""What holds of every workload in the catalogue."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import workloads
from workloads.workload import ALGORITHMS, Data, Workload

NAMES = workloads.names()
load = cache(lambda name: workloads.get(name).load())


def batch_loss(workload: Workload, model: Callable[..., Tensor], batch: tuple[Tensor, ...]) -> Tensor:
    if isinstance(workload.loss, nn.Module):
        inputs, targets = batch
        loss: Tensor = workload.loss(model(inputs), targets)
        return loss
    return workload.loss(model, batch).mean()


def seeded_model(workload: Workload, data: Data) -> nn.Module:
    torch.manual_seed(0)
    return workload.make_model(data)


@pytest.mark.parametrize("name", NAMES)
def test_two_loads_are_equal_and_draw_nothing(name: str) -> None:
    before = torch.get_rng_state()
    first, second = load(name), workloads.get(name).load()
    assert torch.equal(before, torch.get_rng_state())
    assert first.sha256 == second.sha256
    assert len(first.sha256) == 64
    assert dict(first.notes) == dict(second.notes)


@pytest.mark.parametrize("name", NAMES)
def test_training_and_validation_examples_do_not_overlap(name: str) -> None:
    data = load(name)
    train = {example.numpy().tobytes() for example in data.train[0]}
    shared = sum(example.numpy().tobytes() in train for example in data.valid[0])
    assert shared == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_drawn_from_the_global_generator(name: str) -> None:
    workload, data = workloads.get(name), load(name)
    same, again, other = (
        [p.detach() for p in (torch.manual_seed(seed), workload.make_model(data))[1].parameters()] for seed in (0, 0, 1)
    )
    assert all(map(torch.equal, same, again))
    assert not all(map(torch.equal, same, other))


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_answers_the_target_and_leaves_no_trace(name: str) -> None:
    workload, data = workloads.get(name), load(name)
    model = seeded_model(workload, data)
    modules = list(model.modules())
    modules[-1].training = len(modules) == 1
    flags = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()

    valid = tuple(tensor[:100] for tensor in data.valid)
    metrics = workload.evaluate(model, valid)

    assert torch.equal(state, torch.get_rng_state())
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    target = workload.target(data)
    assert not target.reached(metrics[target.metric])
    assert metrics == workload.evaluate(model, valid)
    assert all(isinstance(value, float) for value in metrics.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_short_training_lowers_the_loss(name: str) -> None:
    workload, data = workloads.get(name), load(name)
    model = seeded_model(workload, data)
    optimizer = torch.optim.Adam(model.parameters(), lr=workload.baselines["adam"]["lr"])
    batches = workload.batches(data, generator=torch.Generator().manual_seed(0))
    fixed = next(batches)
    start = batch_loss(workload, model, fixed).item()
    for _, batch in zip(range(40), batches, strict=False):
        batch_loss(workload, model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert batch_loss(workload, model, fixed).item() < 0.75 * start


@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_has_a_baseline(name: str) -> None:
    assert set(workloads.get(name).baselines) == set(ALGORITHMS)


@pytest.mark.parametrize("name", ["digits_mlp", "quadratic"])
def test_the_adam_baseline_reaches_the_target_within_the_budget(name: str) -> None:
    workload, data = workloads.get(name), load(name)
    model, target = seeded_model(workload, data), workload.target(data)
    optimizer = torch.optim.Adam(model.parameters(), **workload.baselines["adam"])
    batches = workload.batches(data, generator=torch.Generator().manual_seed(0))
    reached = False
    for step, batch in zip(range(1, workload.steps + 1), batches, strict=False):
        batch_loss(workload, model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % workload.evaluate_every == 0:
            reached = reached or target.reached(workload.evaluate(model, data.valid)[target.metric])
    assert reached
