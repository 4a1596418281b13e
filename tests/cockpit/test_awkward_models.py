"""Models and losses that do more than return an output: what is read of them is still right, and they do not notice."""

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cockpit_bench import Cockpit, Event

QUIET: dict[str, Any] = {"sinks": [], "budget": None, "panel": None}


def problem(seed: int = 0) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return model, (torch.randn(16, 4, dtype=torch.float64), torch.randint(0, 3, (16,)))


def one_step(
    model: nn.Module, batch: Any, loss: Any, lr: float = 0.1, *, noise: bool = True, **settings: Any
) -> Cockpit:
    """One SGD step under the eyes of the noise scale and the step ratio."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    instruments = {"step/step_ratio": 1, **({"gradient/noise_scale": 1} if noise else {})}
    instruments |= settings.pop("instruments", {})
    cockpit = Cockpit(model, optimizer, loss=loss, instruments=instruments, strict=True, **QUIET, **settings)
    losses = loss(model, batch) if not isinstance(loss, nn.Module) else loss(model(batch[0]), batch[1])
    losses.mean().backward()
    cockpit.observe(batch)
    optimizer.step()
    cockpit.close()
    return cockpit


def penalised(call: Any, batch: Any) -> Tensor:
    penalty = sum(p.square().sum() for p in penalised.params)  # type: ignore[attr-defined]
    return F.cross_entropy(call(batch[0]), batch[1], reduction="none") + 0.05 * penalty


def closed_over(call: Any, batch: Any) -> Tensor:
    return F.cross_entropy(closed_over.model(batch[0]), batch[1], reduction="none")  # type: ignore[attr-defined]


@pytest.mark.parametrize("loss", [penalised, closed_over])
def test_a_loss_that_reaches_the_model_past_call(loss: Any) -> None:
    model, batch = problem()
    penalised.params, closed_over.model = list(model.parameters()), model  # type: ignore[attr-defined]
    params = list(model.parameters())
    grads = torch.autograd.grad(loss(model, batch).mean(), params)
    g_D = torch.cat([g.reshape(-1) for g in grads])
    before = loss(model, batch).mean().item()
    cockpit = one_step(model, batch, loss)
    noise, step = cockpit.last["gradient/noise_scale"], cockpit.last["step/step_ratio"]
    assert noise["squared_norm_of_sum"] == pytest.approx(16**2 * float(g_D.square().sum()), rel=1e-9)
    assert step["slope"] == pytest.approx(-0.1 * float(g_D.square().sum()), rel=1e-9)
    assert step["change"] == pytest.approx(float(loss(model, batch).mean()) - before, rel=1e-9)


class Normaliser(nn.Module):
    """Divides by a running scale that every forward in training mode moves."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.scale = 0.5 * self.scale + 0.5 * x.detach().abs().mean() * 3
        return x / self.scale


def test_both_ends_of_a_step_see_the_same_buffers() -> None:
    model, batch = problem()
    model = nn.Sequential(Normaliser(), *model)
    cockpit = one_step(model, batch, nn.CrossEntropyLoss(), lr=1e-3, noise=False)
    step = cockpit.last["step/step_ratio"]
    assert abs(step["change"] - step["slope"]) < 0.05 * abs(step["slope"])
    assert abs(step["r"]) < 0.05


class Storing(nn.Module):
    """Keeps its last activation and feeds its mean back: what a probe left here would train."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.memory = nn.Linear(4, 3).double(), torch.zeros(3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x) + 0.1 * self.memory
        self.memory = out.mean(0).detach()
        return out


def test_attributes_that_a_forward_writes_are_put_back() -> None:
    trained = []
    for watched in (False, True):
        torch.manual_seed(0)
        model, (_, batch) = Storing(), problem()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        cockpit = Cockpit(model, optimizer, loss=nn.CrossEntropyLoss(), enabled=watched, instruments={
            "curvature/sharpness": 1, "gradient/noise_scale": 1, "step/step_ratio": 1}, **QUIET)  # fmt: skip
        for _ in range(5):
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            cockpit.observe(batch)
            optimizer.step()
            optimizer.zero_grad()
        cockpit.close()
        trained.append(model.layer.weight.detach().clone())
        assert not cockpit.enabled or not [e for e in cockpit.records if getattr(e, "name", "") == "gradient_mismatch"]
    assert torch.equal(*trained)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        def attend(h: Tensor) -> Tensor:
            q = self.q(h).unsqueeze(0)
            return F.scaled_dot_product_attention(q, q, q).squeeze(0)

        h = checkpoint(attend, x, use_reentrant=False) if self.training else attend(x)
        return self.out(h)


@pytest.mark.parametrize("keep", [True, False])
def test_activation_checkpointing_changes_no_reading(keep: bool) -> None:
    found = []
    for training in (True, False):
        torch.manual_seed(0)
        model, batch = Checkpointed().double().train(training), problem()[1]
        cockpit = Cockpit(model, torch.optim.SGD(model.parameters(), lr=5.0), loss=nn.CrossEntropyLoss(), strict=True,
                          instruments={"curvature/sharpness": 1, "step/step_ratio": 1}, **QUIET)  # fmt: skip
        cockpit._observer.probes.held.keep_graphs = keep
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        cockpit.observe(batch)
        cockpit._observer.probes.optimizers[0].step()
        cockpit.close()
        found.append((cockpit.last["curvature/sharpness"]["sharpness"], cockpit.last["step/step_ratio"]["slope"]))
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_added_losses_are_k_times_as_sharp() -> None:
    """Four accumulated losses, added or averaged: the optimizer that sees their sum is four times nearer its edge."""
    rhos = {}
    for divide in (1, 4):
        model, (x, y) = problem()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1 / (4 // divide))
        cockpit = Cockpit(model, optimizer, loss=nn.CrossEntropyLoss(), accumulate=4, strict=True,
                          instruments={"curvature/preconditioned_sharpness": 1}, **QUIET)  # fmt: skip
        for i in range(4):
            part = (x[4 * i : 4 * i + 4], y[4 * i : 4 * i + 4])
            (F.cross_entropy(model(part[0]), part[1]) / divide).backward()
            cockpit.observe(part)
        optimizer.step()
        cockpit.close()
        rhos[divide] = cockpit.last["curvature/preconditioned_sharpness"]["rho"]
    assert rhos[1] == pytest.approx(rhos[4], rel=1e-9)  # sum at a quarter of the rate = mean at the whole rate


def test_a_reading_on_a_batch_is_of_that_batch() -> None:
    model, one = problem()
    other = (3 * one[0], one[1])
    cockpit = Cockpit(model, torch.optim.SGD(model.parameters(), lr=0.1), loss=nn.CrossEntropyLoss(), **QUIET)
    F.cross_entropy(model(one[0]), one[1]).backward()
    cockpit.observe(one)
    readings = [cockpit.read("curvature/sharpness", batch) for batch in (one, other)]
    assert readings[0].values["sharpness"] != readings[1].values["sharpness"]
    assert {r.provenance["batch"] for r in readings} == {"given"}
    empty = cockpit.read("curvature/sharpness", (one[0][:0], one[1][:0]))
    assert empty.status == "failed"
    assert "at least one example" in empty.reason


def test_provenance_says_what_was_done() -> None:
    model, batch = problem()
    instruments = {"curvature/sharpness": 1, "gradient/norm": 1, "step/learning_rate": 1}
    cockpit = one_step(model.eval(), batch, nn.CrossEntropyLoss(), instruments=instruments)
    facts = {r.instrument: dict(r.provenance) for r in cockpit.records if hasattr(r, "provenance")}
    assert facts["curvature/sharpness"]["mode"] == "eval"
    assert facts["curvature/sharpness"]["precision"] == "float64"
    assert facts["gradient/norm"]["scaled"] == "no"
    assert facts["gradient/norm"]["clipped"] == "unknown"
    assert "mode" not in facts["gradient/norm"]


def test_complex_parameters_are_refused_by_name() -> None:
    model = nn.Linear(2, 2, dtype=torch.cfloat)

    def losses(call: Any, x: Any) -> Tensor:
        return call(x).abs().square().sum(1)

    cockpit = Cockpit(model, torch.optim.SGD(model.parameters(), lr=0.1), loss=losses, **QUIET)
    x = torch.randn(4, 2, dtype=torch.cfloat)
    losses(model, x).mean().backward()
    cockpit.observe(x)
    assert "complex" in cockpit.read("curvature/sharpness").reason


def test_an_optimizer_that_steps_past_its_hooks_is_noticed() -> None:
    """Sharpness-aware minimisation steps by methods of its own names; the wrapped optimizer's step never runs."""

    class Sam(torch.optim.SGD):
        @torch.no_grad()
        def second_step(self) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"] * p.grad)

    model, batch = problem()
    optimizer = Sam(model.parameters(), lr=0.1)
    cockpit = Cockpit(model, optimizer, loss=nn.CrossEntropyLoss(), instruments={"gradient/norm": 1}, **QUIET)
    for _ in range(4):
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        cockpit.observe(batch)
        optimizer.second_step()
        optimizer.zero_grad()
    cockpit.close()
    assert cockpit.step == 4
    assert [r.step for r in cockpit.records if getattr(r, "instrument", "") == "gradient/norm"] == [0, 1, 2, 3]


def test_what_is_not_one_number_is_an_event_and_nothing_breaks() -> None:
    model, batch = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cockpit = Cockpit(model, optimizer, loss=nn.CrossEntropyLoss(), instruments={"batch/loss": 1}, **QUIET)
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    losses.mean().backward()
    cockpit.observe(batch, losses)
    cockpit.log(speed=torch.ones(3), fine=1.0)
    optimizer.step()
    outcome = cockpit.close()
    assert outcome is not None
    assert outcome.status == "done"
    assert cockpit.last["batch/loss"]["loss"] == pytest.approx(float(losses.mean()))
    reasons = [e.detail["reason"] for e in cockpit.records if isinstance(e, Event) and e.name == "observe_failed"]
    assert any("one number, got shape" in reason for reason in reasons)
    assert len(reasons) == 2


@pytest.mark.parametrize("given", [0.3, np.float32(0.3), np.array(0.3), "0.3", {"loss": 0.3}])
def test_a_loss_is_a_number_of_any_kind_or_is_recomputed(given: Any) -> None:
    model, batch = problem()
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cockpit = Cockpit(model, optimizer, loss=nn.CrossEntropyLoss(), instruments={"batch/loss": 1}, **QUIET)
    cockpit.observe(batch, given)
    reasons = [e.detail["reason"] for e in cockpit.records if isinstance(e, Event) and e.name == "observe_failed"]
    if isinstance(given, str | dict):
        cockpit.observe(batch, type(given)() if isinstance(given, str) else {"loss": 0.4})
        reasons = [e.detail["reason"] for e in cockpit.records if isinstance(e, Event) and e.name == "observe_failed"]
        assert len(reasons) == 1, "once, whatever the values"
        assert f"expected the loss as one number, got an object of {type(given).__name__}" in reasons[0]
        assert cockpit.last["batch/loss"]["loss"] == pytest.approx(loss.item())
    else:
        assert not reasons
        assert cockpit.last["batch/loss"]["loss"] == pytest.approx(0.3)


def test_a_cockpit_that_is_dropped_lets_the_model_go_and_ends_its_run() -> None:
    model, batch = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[Any] = []
    cockpit = Cockpit(model, optimizer, loss=nn.CrossEntropyLoss(), panel="light", sinks=[seen.append])
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    cockpit.observe(batch)
    optimizer.step()
    alive = weakref.ref(model)
    del cockpit, model, optimizer
    gc.collect()
    assert alive() is None
    assert [getattr(record, "status", "") for record in seen][-1] == "done"
