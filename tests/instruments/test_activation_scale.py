"""Size of the layers' outputs against sums written out by hand, on every case."""

import math
from typing import Any

import pytest
import torch
from cases import BY_NAME, CASES, Case, build
from torch import Tensor, nn
from zoo import ZOO, Odd

from instruments import Probe, Refusal, View
from instruments.network import _calls
from instruments.network.activation_scale import ActivationScale, slope
from instruments.objective import as_objective


def read(model: nn.Module, loss: Any, batches: list[Any]) -> tuple[dict[str, Any], View]:
    instrument = ActivationScale()
    with Probe(model, as_objective(loss), [], batches) as probe:
        view = View(probe, instrument.needs)
        return dict(instrument.read(view)), view


def outputs_by_hand(model: nn.Module, loss: Any, batch: Any) -> dict[str, list[Tensor]]:
    """Outputs of the modules without modules inside, copied at the time of the call."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if not list(module.children()) or isinstance(module, nn.MultiheadAttention):

            def keep(_m: Any, _i: Any, out: Any, name: str = name) -> None:
                seen.setdefault(name or "model", []).append((out[0] if isinstance(out, tuple) else out).clone())

            handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        loss(model, batch) if not isinstance(loss, nn.Module) else model(batch[0])
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("case", [c for c in CASES if not c.random], ids=lambda case: case.name)
def test_moments_are_those_of_the_outputs(case: Case) -> None:
    built = build(case)
    expected = outputs_by_hand(built.model, built.loss, built.batch)
    before = {name: t.clone() for name, t in built.model.state_dict().items()}
    values, view = read(built.model, built.loss, [built.batch])
    assert view.meter.provenance["modules"] == list(expected)
    flat = [torch.cat([t.flatten() for t in of_one]) for of_one in expected.values()]
    assert values["rms"].tolist() == pytest.approx([math.sqrt(sum(v * v for v in x.tolist()) / len(x)) for x in flat])
    assert values["mean"].tolist() == pytest.approx([sum(x.tolist()) / len(x) for x in flat])
    assert values["zeros"].tolist() == pytest.approx([sum(v == 0 for v in x.tolist()) / len(x) for x in flat])
    assert all(torch.equal(t, before[name]) for name, t in built.model.state_dict().items())
    assert view.meter.gradients == pytest.approx(1 / 3)


@pytest.mark.parametrize("odd", ZOO, ids=lambda odd: odd.name)
def test_odd_models_are_read(odd: Odd) -> None:
    torch.manual_seed(0)
    model, x = odd.model(), odd.inputs()
    y = torch.randint(0, 3, (len(x),))
    values, view = read(model, nn.CrossEntropyLoss(), [(x, y)])
    expected = outputs_by_hand(model, nn.CrossEntropyLoss(), (x, y))
    names = view.meter.provenance["modules"]
    assert set(names) >= {name for name in expected if name.split(".")[-1] not in ("0", "original0", "original1")}
    rms = dict(zip(names, values["rms"].tolist(), strict=True))
    for name, outputs in expected.items():
        if name in rms:
            assert rms[name] == pytest.approx(float(torch.cat([t.flatten() for t in outputs]).square().mean().sqrt()))


def test_an_activation_in_place_does_not_change_the_layer_before_it() -> None:
    built = build(BY_NAME["in_place_relu"])
    values, _ = read(built.model, built.loss, [built.batch])
    assert values["zeros"][0] == 0
    assert values["zeros"][1] > 0.2
    assert values["mean"][0] != values["mean"][1]


def test_a_deep_linear_net_shrinks_by_its_gain() -> None:
    model = nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(8, 8, bias=False), nn.Identity())])
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.copy_(0.5 * torch.linalg.qr(torch.randn(8, 8))[0])  # type: ignore[union-attr,operator]
    values, _ = read(model, nn.MSELoss(), [(torch.randn(5, 8), torch.randn(5, 8))])
    assert float(values["slope"].value) == pytest.approx(math.log(0.5), rel=1e-5)
    assert float(values["slope"].stderr) < 1e-5


def test_micro_batches_are_one_batch() -> None:
    built = build(BY_NAME["cnn"])
    x, y = built.batch
    whole, _ = read(built.model, built.loss, [(x, y)])
    parts, _ = read(built.model, built.loss, [(x[:2], y[:2]), (x[2:], y[2:])])
    for name in ("rms", "mean", "zeros"):
        assert torch.allclose(whole[name], parts[name])


def test_the_slope_has_the_error_of_least_squares() -> None:
    torch.manual_seed(0)
    y_RM = torch.randn(4000, 7, dtype=torch.float64)
    found = [slope(y_M) for y_M in y_RM]
    spread = float(torch.stack([torch.as_tensor(e.value) for e in found]).std())
    claimed = float(torch.stack([torch.as_tensor(e.stderr) for e in found]).square().mean().sqrt())
    assert claimed == pytest.approx(spread, rel=0.05)
    assert math.isnan(float(slope(torch.ones(1)).value))


def test_numbers_that_are_not_finite_are_data() -> None:
    built = build(BY_NAME["mlp"])
    x, y = built.batch
    values, _ = read(built.model, built.loss, [(x / 0, y)])
    assert torch.isnan(values["rms"]).all()
    assert math.isnan(float(values["slope"].value))


def test_half_precision_does_not_overflow() -> None:
    model = nn.Linear(4, 4, bias=False).half()
    nn.init.ones_(model.weight)
    x = torch.full((30, 4), 100.0, dtype=torch.float16)
    values, _ = read(model, nn.MSELoss(), [(x, x)])
    assert float(values["rms"][0]) == pytest.approx(400)  # whose square is more than float16 can hold


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 3)


def test_parts_that_the_loss_calls_keep_their_full_names() -> None:
    model = Parts()

    def losses(call: Any, batch: Any) -> Tensor:
        return nn.CrossEntropyLoss(reduction="none")(call.head(call.body(batch[0])), batch[1])

    batch = (torch.randn(5, 4), torch.randint(0, 3, (5,)))
    _, view = read(model, losses, [batch])
    assert view.meter.provenance["modules"] == ["body.0", "body.1", "head"]


def test_a_model_whose_forward_is_not_called_as_a_module_is_refused() -> None:
    model = nn.Linear(4, 3)
    with pytest.raises(Refusal, match="hooks do not see"):
        read(model, lambda call, batch: call.forward(batch[0]).sum(1), [(torch.randn(2, 4), torch.zeros(2))])


def test_many_modules_are_listed_at_even_distances() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(301)])
    values, view = read(model, nn.MSELoss(), [(torch.randn(2, 2), torch.randn(2, 2))])
    names = view.meter.provenance["modules"]
    assert len(names) == len(values["rms"]) == 200
    assert (names[0], names[-1]) == ("0", "300")
    assert len(set(names)) == 200


def test_no_hook_and_no_switch_is_left() -> None:
    from torch.nn.modules import module as hooks

    built = build(BY_NAME["mlp"])
    read(built.model, built.loss, [built.batch])
    with pytest.raises(RuntimeError, match="broken"):
        read(built.model, broken, [built.batch])
    assert not hooks._global_forward_hooks
    assert not hooks._global_forward_pre_hooks
    assert torch.backends.mha.get_fastpath_enabled()
    assert _calls.MOST_MODULES == 200


def broken(call: Any, batch: Any) -> Tensor:
    call(batch[0])
    raise RuntimeError("broken")
