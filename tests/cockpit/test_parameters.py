"""Readings restricted to some of the parameters by the patterns of their names."""

from typing import Any

import pytest
import torch
from loop_cases import CASES, CROSS_ENTROPY, Training, mlp, rows
from torch import Tensor, nn, optim
from torch.func import functional_call
from watching import events, readings, values, watch

from cockpit_bench import Cockpit, ProbeSettings, batches
from cockpit_bench.panels import PANELS
from cockpit_bench.testing.traces import differences, state_of

PLAIN = CASES[0]
HEAD = ("2.weight", "2.bias")


def block_of_the_hessian(model: nn.Module, names: tuple[str, ...], batch: Any) -> Tensor:
    """Dense second derivative of the loss with respect to the named parameters alone, by torch.autograd.functional."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    shapes = [params[name].shape for name in names]
    flat_D = torch.cat([params[name].reshape(-1) for name in names])

    def loss(v_D: Tensor) -> Tensor:
        pieces = torch.split(v_D, [shape.numel() for shape in shapes])
        chosen = {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
        found: Tensor = CROSS_ENTROPY(functional_call(model, {**params, **chosen}, batch[0]), batch[1])
        return found

    hessian_DD: Tensor = torch.autograd.functional.hessian(loss, flat_D)
    return hessian_DD


@pytest.mark.parametrize(("patterns", "names"), [("2.*", HEAD), (["*.weight"], ("0.weight", "2.weight"))])
def test_what_is_read_is_about_those_parameters_alone(patterns: Any, names: tuple[str, ...]) -> None:
    training = Training(PLAIN)
    cockpit = watch(training, parameters=patterns, panel="standard", probe=batches(rows(5)))
    top = torch.linalg.eigvalsh(block_of_the_hessian(training.model, names, rows(5)))[-1]
    batch, loss = training.backward(0)
    named = dict(training.model.named_parameters())
    norm = torch.cat([named[name].grad.reshape(-1) for name in names]).norm()
    weight = torch.cat([named[name].detach().reshape(-1) for name in names]).norm()
    cockpit.observe(batch, loss)
    training.take_step()
    assert values(cockpit, "gradient/norm", "norm") == [pytest.approx(float(norm), rel=1e-6)]
    assert values(cockpit, "network/weight_norm", "weight_norm") == [pytest.approx(float(weight), rel=1e-6)]
    assert values(cockpit, "curvature/sharpness", "sharpness") == [pytest.approx(float(top), rel=0.01)]
    (layers,) = events(cockpit, "layers")
    assert tuple(layers.detail["names"]) == names
    cockpit.close()


def test_training_is_as_without() -> None:
    training, alone = Training(PLAIN), Training(PLAIN).run(4)
    cockpit = watch(training, parameters="2.*", panel="standard")
    training.run(4, cockpit.observe)
    assert {r.instrument for r in readings(cockpit, status="ok")} == set(PANELS["standard"]) - {"step/step_ratio"}
    (failed,) = readings(cockpit, status="failed")
    assert failed.reason.startswith("a step changes all parameters")
    assert not events(cockpit, "gradient_mismatch")
    sides = (training.model, training.optimizers), (alone.model, alone.optimizers)
    assert differences(*(state_of(*side) for side in sides)) == []
    cockpit.close()


def test_prices_of_readings_of_some_parameters() -> None:
    cockpit = watch(Training(PLAIN), parameters="2.*", panel="standard")
    assert {row.how for row in cockpit.prices(rows(0)).rows} == {"measured", "declared"}
    cockpit.close()


def test_the_other_settings_stay() -> None:
    training = Training(PLAIN)
    cockpit = watch(training, parameters="2.*", panel="standard", settings=ProbeSettings(mode="eval"))
    cockpit.observe(*training.backward(0))
    (reading,) = readings(cockpit, "curvature/sharpness")
    assert reading.provenance["mode"] == "eval"
    assert tuple(events(cockpit, "layers")[0].detail["names"]) == HEAD
    cockpit.close()


@pytest.mark.parametrize("patterns", ["1.*", (), ["adapter", "lora"]])
def test_patterns_that_match_nothing_are_refused_at_once(patterns: Any) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"patterns that match trainable parameters, .*the names are 0.weight, 0.bias"):
        Cockpit(model, optim.SGD(model.parameters(), lr=0.1), loss=CROSS_ENTROPY, parameters=patterns)
