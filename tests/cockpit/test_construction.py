"""Misuse is an exception when the cockpit is made: what was expected, what was given, what to do. Nothing is left."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loop_cases import CASES, Case, Training, case_named, mlp, rows
from refusals import expected_refusals
from torch import Tensor, nn, optim
from watching import EVERYTHING, events, readings, watch

from cockpit_bench import Cockpit, at, batches
from cockpit_bench.testing.traces import state_of
from instruments.curvature.sharpness import Sharpness
from instruments.gradient.norm import Norm
from instruments.running import unwrapped

PLAIN = CASES[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"panel": "standrad"}, r"name of a panel, got 'standrad'; did you mean standard"),
        ({"instruments": {"curvature/sharpnes": 1}}, r"got 'curvature/sharpnes'; did you mean curvature/sharpness"),
        ({"instruments": {"mine": ("gradient/norms", 1)}}, r"got 'gradient/norms'; did you mean gradient/norm"),
        ({"panel": {"gradient/nrom": 1}}, r"got 'gradient/nrom'; did you mean gradient/norm"),
        ({"instruments": {"mine": (Sharpness, 1)}}, r"an instance, not a class"),
        ({"instruments": {"mine": (Sharpness(), 1, 2)}}, r"expected \(instrument, cadence\) for 'mine'"),
        ({"instruments": {"gradient/norm": 0}}, r"at least 1, got 0"),
        ({"instruments": {"gradient/norm": "often"}}, r"at least 1, got 'often'"),
        ({"budget": 5}, r"between 0 and 1, or None for no limit, got 5"),
        ({"steps": 0, "panel": "standard"}, r"expected steps, .* whole number of at least 1, got 0"),
        ({"instruments": {"mine": Norm()}}, r"a cadence for 'mine', got the instrument Norm\(\) alone"),
        ({"target": "accuracy"}, r"expected target as at_least\(metric, value\).* got 'accuracy'"),
        ({"sinks": ["console"]}, r"list of sinks .* or functions of a record, got 'console'"),
        ({"sinks": print}, r"expected sinks as a list, got builtin_function_or_method; write sinks=\[...\]"),
        ({"loss": None}, r"expected an nn loss module or a function losses\(call, batch\)"),
        ({"loss": nn.functional.cross_entropy}, r"pass the module of the same name"),
        ({"loss": nn.CTCLoss()}, r"got CTCLoss"),
        ({"probe": []}, r"pass probe=batches"),
    ],
)
def test_misuse_is_named_and_leaves_no_folder(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    training = Training(PLAIN)
    before = state_of(training.model, training.optimizers)
    with pytest.raises(ValueError, match=message):
        watch(training, logdir=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()
    assert state_of(training.model, training.optimizers) == before
    assert len(training.optimizers[0]._optimizer_step_pre_hooks) == 0


def test_numbers_may_be_those_of_numpy() -> None:
    watch(Training(PLAIN), steps=np.int64(10)).close()


def test_parameters_in_place_of_the_model() -> None:
    """As the original Cockpit was called."""
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"an nn.Module, first, got generator; pass the module itself"):
        Cockpit(model.parameters(), optim.SGD(model.parameters(), lr=0.1), loss=nn.MSELoss())  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)], ids=["none", "frozen"])
def test_a_model_without_trainable_parameters(tmp_path: Path, model: nn.Module) -> None:
    optimizer = optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(ValueError, match=r"with trainable parameters, got one where none.*set requires_grad"):
        Cockpit(model, optimizer, loss=nn.MSELoss(), logdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """A file is in the way: also the superuser cannot write there."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"a folder that can be written .* choose another logdir") as caught:
        watch(Training(PLAIN), logdir=tmp_path / "file" / "run")
    assert str(tmp_path / "file") in str(caught.value)


def test_settings_may_be_given_as_documented(tmp_path: Path) -> None:
    training = Training(PLAIN)
    seen: list[Any] = []
    cockpit = watch(
        training,
        panel={"gradient/norm": 2},
        instruments={"fine": (Sharpness(tol=1e-3), at(0, 3)), "again": ("gradient/norm", lambda step: step == 1)},
        probe=batches(rows(100), rows(101)),
        logdir=str(tmp_path / "run"),
        sinks=[seen.append],
    )
    training.run(4, cockpit.observe)
    assert [r.step for r in readings(cockpit, "gradient/norm")] == [0, 2]
    assert [r.step for r in readings(cockpit, "again")] == [1]
    assert [(r.step, r.provenance["examples"]) for r in readings(cockpit, "fine")] == [(0, 24), (3, 24)]
    assert len(seen) == len(cockpit.records)
    cockpit.close()


def test_the_users_cadence_replaces_the_panels() -> None:
    training = Training(PLAIN)
    cockpit = watch(training, panel="light", instruments={"gradient/norm": (Norm(), 3)})
    training.run(4, cockpit.observe)
    assert [r.step for r in readings(cockpit, "gradient/norm")] == [0, 3]
    assert [r.step for r in readings(cockpit, "batch/loss")] == [0, 1, 2, 3]
    cockpit.close()


def test_an_empty_panel_reads_nothing() -> None:
    training = Training(PLAIN)
    cockpit = watch(training, instruments=None)
    training.run(3, cockpit.observe)
    assert cockpit.records == []
    assert cockpit.step == 3
    cockpit.close()


class Compiled(nn.Module):
    """What torch.compile gives back: the user's module under another name."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._orig_mod = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self._orig_mod(x)
        return out


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "compiled": Compiled,
    "compiled DataParallel": lambda model: Compiled(nn.DataParallel(model)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_model_is_read_as_the_module_inside(name: str) -> None:
    inner = Training(PLAIN)
    reference = watch(inner)
    inner.run(3, reference.observe)
    wrapped = Training(Case("wrapped", lambda: WRAPPERS[name](mlp())))
    cockpit = watch(wrapped)
    wrapped.run(3, cockpit.observe)
    assert type(unwrapped(wrapped.model)) is type(inner.model)
    assert [str(r.values) for r in readings(cockpit)] == [str(r.values) for r in readings(reference)]
    assert {r.instrument for r in readings(cockpit, status="ok")} == set(EVERYTHING) - expected_refusals(inner)
    assert not events(cockpit, "observe_failed")
    for one in (cockpit, reference):
        one.close()


@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile(model)", "model.compile()"])
def test_a_module_that_is_really_compiled_is_read_without_compiling(in_place: bool) -> None:
    calls: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def counted(*args: Any) -> Any:
            calls.append(1)
            return graph.forward(*args)

        return counted

    training = Training(case_named("partly used"))
    if in_place:
        training.model.compile(backend=backend)
    else:
        training.model = torch.compile(training.model, backend=backend)
    cockpit = watch(training)
    batch, loss = training.backward(0)
    compiled = len(calls)
    assert compiled == 1
    cockpit.observe(batch, loss)
    training.take_step()
    assert len(calls) == compiled
    assert {r.instrument for r in readings(cockpit, status="ok")} == set(EVERYTHING) - expected_refusals(training)
    cockpit.close()


def test_an_optimizer_of_another_model_is_refused() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(ValueError, match="holds none of them"):
        Cockpit(model, torch.optim.SGD(other.parameters(), lr=0.1), loss=nn.MSELoss(), sinks=[])


def test_one_batch_as_probe_is_not_taken_for_two() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"did you mean probe=batches\(\(x, y\)\)"):
        Cockpit(
            model, torch.optim.SGD(model.parameters(), lr=0.1), loss=nn.MSELoss(), sinks=[],
            probe=(torch.randn(3, 2), torch.randn(3, 2)),
        )  # fmt: skip


@pytest.mark.parametrize("given", [["curvature/sharpness"], "curvature/sharpness", 3])
def test_instruments_are_a_mapping(given: object) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="mapping from label to cadence"):
        Cockpit(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            loss=nn.MSELoss(),
            sinks=[],
            instruments=given,  # type: ignore[arg-type]
        )


@pytest.mark.parametrize("late", [False, True])
def test_observing_after_the_step_is_said_at_once(late: bool) -> None:
    model = nn.Linear(2, 2)
    optimizer, (x, y) = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(2, 3, 2)
    with Cockpit(model, optimizer, loss=nn.MSELoss(), sinks=[], panel="light") as cockpit:
        for _ in range(3):
            optimizer.zero_grad()
            loss = nn.MSELoss()(model(x), y)
            loss.backward()
            if late:
                optimizer.step()
            cockpit.observe((x, y), loss)
            if not late:
                optimizer.step()
        told = [record for record in cockpit.records if getattr(record, "name", "") == "observed_late"]
    assert len(told) == late


def test_a_target_that_nobody_logged_is_named() -> None:
    from cockpit_bench import at_least

    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cockpit = Cockpit(model, optimizer, loss=nn.MSELoss(), sinks=[], target=at_least("valid_acc", 0.5))
    with cockpit.evaluating() as log:
        log(valid_accuracy=0.9)
    outcome = cockpit.close()
    assert outcome is not None
    assert outcome.status == "miss"
    assert outcome.reason == "'valid_acc' was never logged inside evaluating(); logged was valid_accuracy"
