"""Losses by example: their mean is the loss of the step for every reduction."""

import math

import pytest
import torch
from cases import BY_NAME, CASES, Case, build
from torch import nn

from instruments import Probe, Refusal, View
from instruments.batch.example_loss import ExampleLoss
from instruments.meter import Meter
from instruments.objective import as_objective

DEFINED = [case for case in CASES if case.examples and not case.random]


@pytest.mark.parametrize("case", DEFINED, ids=lambda case: case.name)
def test_the_mean_is_the_loss(case: Case) -> None:
    built = build(case)
    instrument = ExampleLoss()
    with Probe(built.model, as_objective(built.loss), [], [built.batch]) as probe:
        view = View(probe, instrument.needs)
        values = instrument.read(view)
        assert float(values["mean"].value) == pytest.approx(float(probe.loss(Meter())), rel=1e-12)
        assert view.meter.gradients == pytest.approx(1 / 3)
    losses_N = view.meter.provenance["examples"]
    assert losses_N == 6


def test_statistics_are_those_of_the_single_losses() -> None:
    built = build(BY_NAME["mlp"])
    x, y = built.batch
    alone = torch.stack(
        [nn.functional.cross_entropy(built.model(x[i : i + 1]), y[i : i + 1]) for i in range(len(x))]
    ).detach()
    instrument = ExampleLoss()
    with Probe(built.model, as_objective(built.loss), [], [built.batch]) as probe:
        values = instrument.read(View(probe, instrument.needs))
    deviation = float(alone.std())
    assert float(values["deviation"]) == pytest.approx(deviation)
    assert float(values["mean"].stderr) == pytest.approx(deviation / math.sqrt(len(x)))
    assert float(values["largest"]) == pytest.approx(float(alone.max()))
    assert float(values["largest_share"]) == pytest.approx(float(alone.max() / alone.sum()))
    assert float(values["median"]) == pytest.approx(float(torch.quantile(alone, 0.5)))


def test_a_broken_example_is_counted_and_the_rest_is_read() -> None:
    built = build(BY_NAME["mlp"])
    x, y = built.batch
    x = x.clone()
    x[2] = float("nan")
    instrument = ExampleLoss()
    with Probe(built.model, as_objective(built.loss), [], [(x, y)]) as probe:
        values = instrument.read(View(probe, instrument.needs))
    assert values["not_finite"] == 1.0
    assert math.isfinite(float(values["mean"].value))


def test_a_single_number_cannot_be_taken_apart() -> None:
    built = build(BY_NAME["mlp"])
    instrument = ExampleLoss()
    loss = as_objective(lambda call, batch: nn.functional.cross_entropy(call(batch[0]), batch[1]))
    with Probe(built.model, loss, [], [built.batch]) as probe, pytest.raises(Refusal, match="single number"):
        instrument.read(View(probe, instrument.needs))
