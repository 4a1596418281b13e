"""Precisions and compilation: the whole catalogue against a plain run in float32."""

import pytest
import torch
from comparing import ADAM, OTHER_CURVATURE, apart, net, observed, same_refusals
from loop_cases import Case, Training, adam, rows
from torch import optim
from watching import readings

from cockpit_bench import Cockpit


@pytest.fixture(scope="module")
def adam_run() -> Cockpit:
    return observed(Training(ADAM))


@pytest.fixture(scope="module")
def one_step() -> Cockpit:
    return observed(Training(ADAM), steps=1)


# Precisions. What is estimated from random vectors draws others in double precision.


def in_precision(dtype: torch.dtype) -> Case:
    return Case(str(dtype), lambda: net().to(dtype), adam, batch=lambda step: (rows(step)[0].to(dtype), rows(step)[1]))


def test_double_precision_reads_as_single(adam_run: Cockpit) -> None:
    training = Training(in_precision(torch.float64))
    cockpit = observed(training)
    assert apart(adam_run, cockpit, rel=0.01, but=OTHER_CURVATURE) == {}
    assert {r.provenance["precision"] for r in readings(cockpit, "gradient/norm")} == {"float64"}
    same_refusals(cockpit, training)


def test_bfloat16_parameters_read_nearly_as_single(one_step: Cockpit) -> None:
    """Within a twentieth, or the error that the reading gives; a search along the step ends at its rounding."""
    training = Training(in_precision(torch.bfloat16))
    cockpit = observed(training, steps=1)
    assert apart(one_step, cockpit, rel=0.05, but=OTHER_CURVATURE | {"step/critical_learning_rate"}) == {}
    (reading,) = readings(cockpit, "step/step_ratio")
    assert reading.provenance["precision"] == "bfloat16"
    assert reading.stderr["r"] > 0.02, (
        "two losses of three digits leave their difference in doubt, and the error says so"
    )
    same_refusals(cockpit, training)


def test_a_loop_under_autocast_reads_nearly_as_single(one_step: Cockpit) -> None:
    """Only `.grad` and the loss come out of the loop; the rest is recomputed in the parameters' own precision."""

    def loop(training: Training, cockpit: Cockpit, step: int) -> None:
        batch = rows(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = training.loss(batch)
        loss.backward()
        cockpit.observe(batch, loss)
        training.take_step()

    training = Training(ADAM)
    cockpit = observed(training, loop, steps=1)
    of_grad = {"gradient/histogram", "gradient/histogram_2d"}  # an element near a limit falls into the next bin
    assert apart(one_step, cockpit, rel=0.05, but=of_grad) == {}
    recomputed = {"batch/example_loss", "gradient/noise_scale", "gradient/signal_to_noise", "curvature/sharpness"}
    near = apart(one_step, cockpit, rel=1e-6)
    assert not [name for name in near if name.rpartition("/")[0] in recomputed]
    same_refusals(cockpit, training)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_reads_as_the_module_inside(backend: str, adam_run: Cockpit) -> None:
    training = Training(Case("compiled", lambda: torch.compile(net(), backend=backend), adam))
    cockpit = observed(training)
    assert apart(adam_run, cockpit, rel=1e-4) == {}
    same_refusals(cockpit, training)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_optimizer_step_reads_as_the_plain_one(backend: str, adam_run: Cockpit) -> None:
    """What is read after the step runs the model from within what is compiled."""
    training = Training(ADAM)
    step = torch.compile(training.take_step, backend=backend)

    def loop(training: Training, cockpit: Cockpit, number: int) -> None:
        cockpit.observe(*training.backward(number))
        step()

    cockpit = observed(training, loop)
    assert apart(adam_run, cockpit, rel=1e-4) == {}
    same_refusals(cockpit, training)


def test_the_comparison_sees_a_difference(adam_run: Cockpit) -> None:
    """Another learning rate is another run, and an exception covers its own outputs alone."""
    other = observed(Training(Case("other", net, lambda model: [optim.Adam(model.parameters(), lr=0.02)])))
    found = apart(adam_run, other, rel=1e-3)
    assert {"step/learning_rate/learning_rate", "step/distance/distance", "gradient/norm/norm"} <= set(found)
    less = apart(adam_run, other, rel=1e-3, but={"step/learning_rate"})
    assert set(found) - set(less) == {"step/learning_rate/learning_rate"}
