"""Model and optimizer can be copied and pickled while the cockpit watches, and nothing of it outlives its close."""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loop_cases import CASES, Case, Training, case_named
from torch import nn
from watching import watch

from cockpit_bench.testing.traces import differences, state_of

Pair = tuple[nn.Module, list[Any]]
MOMENTS = ("before observe", "between observe and step", "after the step", "after a reading on demand")


def deep(pair: Pair) -> Pair:
    return copy.deepcopy(pair)


def pickled(pair: Pair) -> Pair:
    loaded: Pair = pickle.loads(pickle.dumps(pair))
    return loaded


def saved(pair: Pair) -> Pair:
    buffer = io.BytesIO()
    torch.save(pair, buffer)
    buffer.seek(0)
    loaded: Pair = torch.load(buffer, weights_only=False)
    return loaded


def copy_at(moment: str, way: Callable[[Pair], Pair], case: Case, watched: bool) -> tuple[Training, Training]:
    """Train two steps and copy within the third; returns the run and the copy, which is where the run was."""
    training = Training(case)
    cockpit = watch(training, enabled=watched)
    copied: list[Pair] = []

    def here(now: str) -> None:
        if now == moment:
            copied.append(way((training.model, training.optimizers)))

    for step in range(3):
        last = step == 2
        batch, loss = training.backward(step)
        if last:
            here("before observe")
        cockpit.observe(batch, loss)
        if last:
            here("between observe and step")
            cockpit.read("curvature/sharpness")
            here("after a reading on demand")
        training.take_step()
    here("after the step")
    cockpit.close()
    twin = Training(case)
    twin.model, twin.optimizers = copied[0]
    return training, twin


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("way", [deep, pickled, saved])
@pytest.mark.parametrize("case", [case_named(name) for name in ("dropout", "attention", "two optimizers")], ids=str)
def test_copies_train_on_without_the_cockpit(case: Case, way: Any, moment: str) -> None:
    ends = []
    for watched in (False, True):
        _, twin = copy_at(moment, way, case, watched)
        torch.manual_seed(0)
        if moment != "after the step":
            twin.take_step()
        for step in range(3, 6):
            twin.backward(step)
            twin.take_step()
        ends.append([twin.losses, state_of(twin.model, twin.optimizers)])
    assert differences(ends[0], ends[1]) == []


def test_a_copied_optimizer_does_not_count_for_the_original() -> None:
    training = Training(CASES[0])
    cockpit = watch(training)
    cockpit.observe(*training.backward(0))
    model, optimizers = copy.deepcopy((training.model, training.optimizers))
    for optimizer in optimizers:
        optimizer.step()
    assert cockpit.step == 0
    training.take_step()
    assert cockpit.step == 1
    assert not differences(state_of(model, ())["hooks"], state_of(training.model, ())["hooks"])
    cockpit.close()


def test_hooks_go_with_the_cockpit() -> None:
    training = Training(CASES[0])
    (optimizer,) = training.optimizers
    before = [len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)]
    cockpit = watch(training)
    training.run(2, cockpit.observe)
    assert [len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)] != before
    cockpit.close()
    assert [len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)] == before
    training.take_step()
    assert cockpit.step == 2


@pytest.mark.parametrize("name", ["mlp", "attention", "accumulation"])
def test_nothing_outlives_a_closed_cockpit(name: str) -> None:
    training = Training(case_named(name))
    cockpit = watch(training)
    training.run(3, cockpit.observe)
    cockpit.observe(*training.backward(3))
    cockpit.close()
    trace = weakref.ref(cockpit)
    parts = [weakref.ref(part) for part in (cockpit._observer, cockpit._readout, cockpit._recorder)]
    gc.collect()
    gc.disable()
    try:
        del cockpit
        assert trace() is None, "the cockpit is in a cycle, or still known to somebody"
    finally:
        gc.enable()
    gc.collect()
    assert [part() for part in parts] == [None] * 3


def test_the_model_is_free_when_the_user_lets_go_of_both() -> None:
    training = Training(CASES[0])
    cockpit = watch(training)
    training.run(2, cockpit.observe)
    trace = weakref.ref(training.model)
    with cockpit:
        pass
    del training, cockpit
    gc.collect()
    assert trace() is None


def test_batches_and_graphs_of_a_step_are_let_go() -> None:
    training = Training(CASES[0])
    cockpit = watch(training)
    traces = []
    for step in range(4):
        batch, loss = training.backward(step)
        cockpit.observe(batch, loss)
        traces.append(weakref.ref(batch[0]))
        training.take_step()
        del batch, loss
    gc.collect()
    assert [trace() is None for trace in traces] == [True, True, True, False], "only the last batch is kept, for read()"
    cockpit.close()
