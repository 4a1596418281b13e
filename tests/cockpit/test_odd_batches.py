"""Losses and batches of every shape: one number, dictionaries, ragged lists, objects, nothing at all."""

import re
from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loop_cases import Case, Training, mlp, rows
from refusals import check_failed, expected_refusals
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from watching import EVERYTHING, events, readings, values, watch

from cockpit_bench import Cockpit, Refusal
from cockpit_bench.testing.traces import differences, state_of
from instruments.held import EXAMPLES

PLAIN = Case("plain", mlp)


class PooledRows(nn.Module):
    """One prediction for each of a list of sequences: the mean of what the layers say of their rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, sequences: list[Tensor]) -> Tensor:
        return torch.stack([self.layers(sequence).mean(0) for sequence in sequences])


@dataclass
class Graph:
    """A batch that torch's containers know nothing of."""

    x: Tensor
    y: Tensor


def ragged(step: int) -> list[Tensor]:
    x_NF, _ = rows(step)
    return list(x_NF.split([1, 4, 2, 5]))


def ragged_losses(call: Any, batch: list[Tensor]) -> Tensor:
    return call(batch).square().sum(1)


def losses_of(x: Callable[[Any], Tensor], y: Callable[[Any], Tensor]) -> Callable[[Any, Any], Tensor]:
    return lambda call, batch: F.cross_entropy(call(x(batch)), y(batch), reduction="none")


@dataclass(frozen=True)
class Shape:
    """A kind of batch, the loss that reads it, how many examples curvature says it was read on, and who refuses it."""

    batch: Callable[[int], Any]
    losses: Callable[[Any, Any], Tensor]
    examples: int
    model: Callable[[], nn.Module] = mlp
    refuse: frozenset[str] = frozenset()


NO_LABELS = frozenset({"batch/label_counts"})
NO_TENSORS = NO_LABELS | {"batch/input_moments", "batch/repeated"}
by_key = losses_of(lambda b: b["x"], lambda b: b["y"])
SHAPES: Mapping[str, Shape] = {
    "dictionary": Shape(lambda s: dict(zip("xy", rows(s), strict=True)), by_key, 12),
    "mapping of another library": Shape(lambda s: UserDict(zip("xy", rows(s), strict=True)), by_key, 12),
    "nested": Shape(lambda s: ({"x": rows(s)[0]}, [rows(s)[1]]), losses_of(lambda b: b[0]["x"], lambda b: b[1][0]), 12),
    "three fields": Shape(
        lambda s: [*rows(s), torch.ones(12)], losses_of(lambda b: b[0], lambda b: b[1]), 12, refuse=NO_LABELS
    ),
    "ragged": Shape(ragged, ragged_losses, 4, PooledRows, NO_LABELS),
    "object": Shape(lambda s: Graph(*rows(s)), losses_of(lambda b: b.x, lambda b: b.y), 0, refuse=NO_TENSORS),
}


def run(shape: Shape, steps: int = 3, **settings: Any) -> tuple[Training, Cockpit]:
    training = Training(Case("odd", shape.model))
    cockpit = watch(training, loss=shape.losses, **settings)
    for step in range(steps):
        batch = shape.batch(step)
        loss = shape.losses(training.model, batch).mean()
        loss.backward()
        cockpit.observe(batch, loss)
        training.take_step()
    return training, cockpit


@pytest.mark.parametrize("name", SHAPES)
def test_every_instrument_reads_batches_of_every_shape(name: str) -> None:
    shape = SHAPES[name]
    ends = []
    for enabled in (False, True):
        training, cockpit = run(shape, enabled=enabled)
        ends.append(state_of(training.model, training.optimizers))
        cockpit.close()
    assert differences(ends[0], ends[1]) == []
    failed = {r.instrument: r.reason for r in readings(cockpit, status="failed")}
    assert not events(cockpit, "observe_failed")
    expected = expected_refusals(training) | shape.refuse
    assert set(failed) == expected, failed
    assert not any(re.match(r"\w*(Error|Exception):", reason) for reason in failed.values()), failed
    assert {r.instrument for r in readings(cockpit, status="ok")} == set(EVERYTHING) - expected
    held = [r.provenance["examples"] for r in readings(cockpit, "curvature/sharpness")]
    assert held == [shape.examples * k or "unknown" for k in (1, 2, 3)]
    assert {r.provenance["examples"] for r in readings(cockpit, "gradient/norm")} == {shape.examples or "unknown"}


def test_a_batch_of_unknown_size_is_held_alone() -> None:
    """Otherwise all the batches of the run would be: their sizes never add up to the limit."""
    _, cockpit = run(SHAPES["object"], steps=5)
    assert len(cockpit.state_dict()["held"]["batches"]) == 1
    cockpit.close()


def test_a_loader_gives_lists_of_fields() -> None:
    x_NF, y_N = rows(0)
    loader = DataLoader(TensorDataset(x_NF, y_N, torch.arange(12.0)), batch_size=4)
    shape = Shape(lambda step: next(iter(loader)), SHAPES["three fields"].losses, 4)
    _, cockpit = run(shape)
    assert readings(cockpit, "curvature/sharpness")[-1].provenance["examples"] == 12
    cockpit.close()


def number(call: Any, batch: Any) -> Tensor:
    return F.cross_entropy(call(batch[0]), batch[1])


def test_a_loss_of_one_number_has_curvature_and_no_examples() -> None:
    single, each = Training(Case("one number", mlp, loss=number)), Training(PLAIN)
    cockpit, reference = watch(single), watch(each)
    single.run(4, cockpit.observe)
    each.run(4, reference.observe)
    for label, output in (("curvature/sharpness", "sharpness"), ("step/step_ratio", "alpha"), ("batch/loss", "loss")):
        assert values(cockpit, label, output) == pytest.approx(values(reference, label, output), rel=1e-3)
    failed = {r.instrument: r.reason for r in readings(cockpit, status="failed")}
    check_failed(single, failed)
    assert "single number" in failed["gradient/noise_scale"]
    assert "return losses_N" in failed["gradient/noise_scale"]
    assert not events(cockpit, "gradient_mismatch")
    for one in (cockpit, reference):
        one.close()


def test_a_loss_module_cannot_read_a_dictionary() -> None:
    training = Training(PLAIN)
    cockpit = watch(training)
    batch, loss = training.backward(0)
    cockpit.observe(dict(zip("xy", batch, strict=True)), loss)
    assert "pass loss as a function losses(call, batch)" in readings(cockpit, "curvature/sharpness")[0].reason
    assert readings(cockpit, "gradient/norm", "ok")
    assert readings(cockpit, "batch/loss", "ok")
    cockpit.close()


def empty() -> tuple[Tensor, Tensor]:
    x_NF, y_N = rows(0)
    return x_NF[:0], y_N[:0]


def test_an_empty_batch_is_an_event_and_training_goes_on() -> None:
    training = Training(PLAIN)
    cockpit = watch(training)
    for step in range(4):
        batch, loss = training.backward(step)
        cockpit.observe(empty() if step in (0, 2, 3) else batch, loss)
        training.take_step()
    (event,) = events(cockpit, "observe_failed")
    assert event.step == 0
    assert "expected a batch with at least one example" in event.detail["reason"]
    assert cockpit.step == 4
    assert [r.step for r in readings(cockpit, "gradient/norm", "ok")] == [1]
    (sharpness,) = readings(cockpit, "curvature/sharpness")
    assert (sharpness.status, sharpness.provenance["examples"]) == ("ok", 12), "the empty batch is not held"
    cockpit.close()


def test_an_empty_batch_raises_when_strict() -> None:
    training = Training(PLAIN)
    cockpit = watch(training, strict=True)
    _, loss = training.backward(0)
    with pytest.raises(Refusal, match="expected a batch with at least one example"):
        cockpit.observe(empty(), loss)
    cockpit.close()


def test_the_probe_batches_must_hold_something() -> None:
    for probe in ([], [empty()]):
        with pytest.raises(ValueError, match=r"at least one example, got none; pass probe=batches"):
            watch(Training(PLAIN), probe=probe)


def test_batches_are_held_until_there_are_enough() -> None:
    def wide(step: int) -> Any:
        x_NF, y_N = rows(step)
        return x_NF.repeat(20, 1), y_N.repeat(20)

    training = Training(Case("wide", mlp, batch=wide))
    cockpit = watch(training)
    training.run(4, cockpit.observe)
    held = [r.provenance["examples"] for r in readings(cockpit, "curvature/sharpness")]
    assert held == [240, 480, 480, 480]
    assert held[-1] <= EXAMPLES
    cockpit.close()


def test_what_is_held_is_a_copy() -> None:
    """A loader may write the next batch over the last one."""
    training = Training(PLAIN)
    x_NF, y_N = rows(0)
    cockpit = watch(training, instruments={"curvature/sharpness": 1})
    training.backward(0)
    cockpit.observe((x_NF, y_N))
    held = cockpit.state_dict()["held"]["batches"][0][0]
    before = held.clone()
    x_NF.zero_()
    assert torch.equal(held, before)
    cockpit.close()
