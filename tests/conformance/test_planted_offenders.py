"""Each check of the conformance suite is seen to fail: by an instrument that does just that one thing wrong."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from cockpit_bench import Gauge, Instrument, Output, Refusal
from cockpit_bench.testing import COVERING_CASES, Case, check_instrument
from cockpit_bench.testing.cases import mlp, rows, sgd
from cockpit_bench.testing.conformance import examine
from instruments import catalogue
from instruments.instrument import State, Values
from instruments.view import Need, View

CASES = COVERING_CASES[:2]
Deed = Callable[[View], Any]
NUMBER: Mapping[str, Output] = {"number": Output("1", "a number")}


@dataclass(frozen=True)
class Doing(Gauge):
    """Does something when it is read, and gives what it is told to."""

    deed: Deed = field(default=lambda view: None)
    cost: float = 0.0

    outputs: ClassVar[Mapping[str, Output]] = NUMBER
    needs: ClassVar[frozenset[Need]] = frozenset({"loss"})
    reference: ClassVar[str] = "none"

    def price(self, view: View) -> float:
        return self.cost

    def read(self, view: View) -> Values:
        loss = float(view.loss)
        given = self.deed(view)
        return given if isinstance(given, dict) else {"number": loss}


@torch.no_grad()
def nudge(view: View) -> None:
    view.layout.params[0].add_(1e-7)


def draw(view: View) -> None:
    torch.rand(3), np.random.rand(), random.random()


def raises(view: View) -> float:
    return 1 / 0


DEEDS: Mapping[str, tuple[Deed, str]] = {
    "writes to a parameter": (nudge, "writes to parameters: parameters/0.weight"),
    "draws random numbers": (draw, "draws from or seeds the global random streams"),
    "seeds": (lambda view: torch.manual_seed(0), "draws from or seeds the global random streams"),
    "switches to eval mode": (lambda view: view._probe.module.eval(), "switches modules between train and eval mode"),
    "writes to a gradient": (lambda view: view._probe.grads[0].mul_(2), "writes to gradients"),
    "sets .grad": (lambda view: setattr(view.layout.params[0], "grad", torch.ones(8, 6)), "sets .grad"),
    "creates optimizer state": (
        lambda view: [view._probe.optimizers[0].state[p] for p in view.layout.params],
        "creates or changes optimizer state",
    ),
    "changes a learning rate": (
        lambda view: view._probe.optimizers[0].param_groups[0].update(lr=0.3),
        "changes what the optimizer holds",
    ),
    "leaves a hook": (
        lambda view: view._probe.module.register_forward_hook(lambda *args: None),
        "leaves hooks on modules",
    ),
    "leaves a hook on a parameter": (
        lambda view: view.layout.params[0].register_hook(lambda g: None),
        "leaves hooks on parameters",
    ),
    "leaves an attribute": (lambda view: setattr(view.layout.params[0], "mark", 1), "leaves attributes on parameters"),
    "marks a module": (lambda view: setattr(view._probe.module, "mark", 1), "leaves attributes on modules"),
    "gives what is not declared": (lambda view: {"other": 1.0}, r"expected the outputs \['number'\], got \['other'\]"),
    "gives many numbers": (lambda view: {"number": torch.ones(3)}, r"declared scalar, has shape \(3,\)"),
    "gives no number": (lambda view: {"number": "one"}, "is a str; expected a number"),
    "gives NaN": (lambda view: {"number": float("nan")}, "not finite; where a value may be NaN"),
    "reads what it does not declare": (lambda view: view.gradient_norm, "AssertionError: .* asked for 'gradient'"),
    "raises": (raises, "ZeroDivisionError.*expected a Refusal"),
}


@pytest.mark.parametrize("name", DEEDS)
def test_deeds(name: str) -> None:
    deed, said = DEEDS[name]
    with pytest.raises(AssertionError, match=f"(?s)Doing does not conform:.*mlp: .*{said}"):
        check_instrument(Doing(deed), CASES)


def test_an_honest_one_passes() -> None:
    assert check_instrument(Doing(), COVERING_CASES[:8]) == {}


@dataclass(frozen=True)
class Counting(Instrument):
    """A number that goes on from reading to reading; where it is kept is the question."""

    kept: Callable[[Any], Any] = field(default=lambda number: number)
    box: dict[str, float] | None = None

    outputs: ClassVar[Mapping[str, Output]] = NUMBER
    needs: ClassVar[frozenset[Need]] = frozenset()
    reference: ClassVar[str] = "none"

    def price(self, view: View) -> float:
        return 0.0

    def init(self) -> State:
        return {"number": self.kept(0.0)}

    def advance(self, view: View, state: State) -> tuple[Values, State]:
        box = state if self.box is None else self.box
        number = float(box["number"]) + 1
        if self.box is not None:
            self.box["number"] = number
        return {"number": number}, {"number": self.kept(number)}


class Odd(float):
    """A number that a checkpoint does not take."""


def test_memory_in_the_state_is_right() -> None:
    assert check_instrument(Counting(), CASES) == {}
    assert check_instrument(Counting(torch.tensor), CASES) == {}


def test_memory_that_cannot_be_saved() -> None:
    with pytest.raises(AssertionError, match=r"memory cannot be saved and loaded .*keep numbers, tensors and lists"):
        check_instrument(Counting(Odd), CASES)


def test_memory_beside_the_state() -> None:
    with pytest.raises(AssertionError, match=r"two runs from one seed differ|after saving and loading it reads"):
        check_instrument(Counting(box={"number": 0.0}), CASES)


TALLY: list[int] = []


def tally(view: View) -> Values:
    TALLY.append(1)
    return {"number": float(len(TALLY))}


def test_two_runs_that_differ() -> None:
    with pytest.raises(AssertionError, match="two runs from one seed differ, at step 0"):
        check_instrument(Doing(tally), CASES)


@dataclass(frozen=True)
class Forgetful(Counting):
    """Saved as half of what it is."""

    def init(self) -> State:
        return {"number": Half(torch.tensor(0.0))}

    def advance(self, view: View, state: State) -> tuple[Values, State]:
        number = float(state["number"]) + 1
        return {"number": number}, {"number": Half(torch.tensor(number))}


class Half(Tensor):
    """A tensor that does not come back from a file as it went there."""

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return (self.as_subclass(Tensor) / 2).__reduce_ex__(protocol)


def test_memory_that_is_saved_wrongly() -> None:
    with pytest.raises(AssertionError, match="after saving and loading it reads otherwise, at step 2"):
        check_instrument(Forgetful(), CASES)


@dataclass(frozen=True)
class Running(Doing):
    """Runs the model: a forward of the step's batch, 1/3 g."""

    outputs: ClassVar[Mapping[str, Output]] = NUMBER
    needs: ClassVar[frozenset[Need]] = frozenset({"example_losses"})

    def read(self, view: View) -> Values:
        return {"number": view.losses_N.mean()}


@pytest.mark.parametrize("cost", [0.0, 0.1, 1.0])
def test_a_wrong_price(cost: float) -> None:
    with pytest.raises(AssertionError, match=f"declares a price of {cost:.3g} g; 0.333 g were counted"):
        check_instrument(Running(cost=cost), CASES)


@pytest.mark.parametrize("cost", [0.17, 1 / 3, 0.6])
def test_a_price_within_a_factor_of_two(cost: float) -> None:
    assert check_instrument(Running(cost=cost), CASES) == {}


def test_a_price_for_nothing() -> None:
    with pytest.raises(AssertionError, match="declares a price of 2 g; 0 g were counted"):
        check_instrument(Doing(cost=2.0), CASES)


@dataclass(frozen=True)
class Greedy(Doing):
    """Declares more than it uses."""

    outputs: ClassVar[Mapping[str, Output]] = NUMBER
    needs: ClassVar[frozenset[Need]] = frozenset({"loss", "parameters"})


def test_a_need_that_is_not_used() -> None:
    with pytest.raises(AssertionError, match="declares the need 'parameters' and does not use it"):
        check_instrument(Greedy(), CASES)


@dataclass(frozen=True)
class Sly(Doing):
    """Does it where nobody looks: when asked for its price."""

    outputs: ClassVar[Mapping[str, Output]] = NUMBER

    def price(self, view: View) -> float:
        nudge(view)
        return 0.0


def test_what_is_not_seen_directly_is_found_by_bisecting() -> None:
    with pytest.raises(AssertionError, match=r"mlp: training is another one with it, at /0/parameters/0.weight"):
        check_instrument(Sly(), CASES)
    others = {name: catalogue.make(name) for name in ("gradient/norm", "batch/loss", "step/learning_rate")}
    for place in range(4):
        labels = list(others.items())
        labels.insert(place, ("sly", Sly()))
        assert set(examine(dict(labels), COVERING_CASES[0]).faults) == {"sly"}


def refuse(view: View) -> None:
    raise Refusal("" if view.step else "not here.")


def refuse_with(reason: str, view: View) -> None:
    if len(view.layout.params) > 4:
        raise Refusal(reason)


LARGE = Case("large", lambda: torch.nn.Sequential(mlp(), torch.nn.Linear(3, 3)), rows, sgd)


def test_refusals_are_told_by_case_and_need_a_reason() -> None:
    picky = Doing(partial(refuse_with, "too many layers for me."))
    assert check_instrument(picky, [*CASES, LARGE]) == {"large": "too many layers for me."}
    with pytest.raises(AssertionError, match="reads none of the cases"):
        check_instrument(Doing(refuse), CASES)
    assert set(examine({"empty": Doing(refuse)}, CASES[0]).faults) == {"empty"}
    for reason in ("", "KeyError: 'x'"):
        with pytest.raises(AssertionError, match="refuses without a reason in words"):
            check_instrument(Doing(partial(refuse_with, reason)), [*CASES, LARGE])


def test_failing_on_a_broken_model_alone_is_a_fault() -> None:
    def strict(view: View) -> None:
        if not torch.stack([p.isfinite().all() for p in view.layout.params]).all():
            raise ValueError("I want numbers")

    with pytest.raises(AssertionError, match="NaN in a parameter: raises ValueError: I want numbers"):
        check_instrument(Doing(strict), CASES)


SHAPES: Mapping[str, tuple[str, Any, str]] = {
    "per-layer": ("per-layer", torch.ones(3), r"has shape \(3,\); expected \(4,\), the trained parameter tensors"),
    "per-group": ("per-group", torch.ones(2), r"has shape \(2,\); expected \(1,\), the parameter groups"),
    "nameless": ("per-module", torch.ones(2), "comes without names"),
    "histogram": ("histogram", torch.ones(3, 4), r"expected \(2, K\)"),
    "limits": ("histogram", torch.ones(2, 4), "limits that do not ascend"),
    "counts": ("histogram", torch.tensor([[0.0, 1.0], [0.5, 1.0]]), "counts that are no whole numbers"),
    "grid": ("grid", torch.ones(1, 4), "expected limits and counts"),
    "grid limits": ("grid", torch.zeros(3, 3), "limits that do not ascend"),
    "spectrum": ("spectrum", torch.ones(3), r"expected \(2, K\)"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_values_that_are_not_of_their_kind(name: str) -> None:
    kind, value, said = SHAPES[name]
    cls = type("Shaped", (Doing,), {"outputs": {"number": Output("1", "a number", kind)}})  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match=said):
        check_instrument(cls(lambda view: {"number": value}), CASES[:1])
