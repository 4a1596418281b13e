"""An instrument with a witness beside it: what it does to its surroundings, and what it says, is written down."""

import re
from dataclasses import dataclass, field
from typing import Any

import torch

from cockpit_bench.testing.traces import bits, differences, state_of
from cockpit_bench.testing.values import value_faults
from instruments.instrument import Instrument, State, Values
from instruments.needs import RUNS_MODEL, Need
from instruments.operators.operator import Operator
from instruments.refusal import Refusal
from instruments.view import View

OPERATORS = frozenset(
    name for name, value in vars(View).items()
    if isinstance(value, property) and value.fget and value.fget.__annotations__.get("return") is Operator
)  # fmt: skip
"""The needs that give a matrix, whose products are billed."""


@dataclass
class Testimony:
    """What was seen of one instrument in one run.

    `faults` are sentences, each once; `refusal` the reason of the last reading that was refused, None where none was;
    `counted` what each reading used, in g, and `declared` the price that it gave for itself.
    """

    faults: list[str] = field(default_factory=list)
    refusal: str | None = None
    refused: int = 0
    counted: list[float] = field(default_factory=list)
    declared: list[float] = field(default_factory=list)

    def fault(self, sentence: str) -> None:
        if sentence not in self.faults:
            self.faults.append(sentence)


def witnessed(
    inner: Instrument, seen: Testimony, needs: frozenset[Need] | None = None, *, healthy: bool = True
) -> Instrument:
    """The instrument, which works as before, with other needs if told so; what happens is added to `seen`."""
    own_needs = inner.needs if needs is None else needs

    class Witnessed(Instrument):
        outputs, needs, reference = inner.outputs, own_needs, inner.reference

        def price(self, view: View) -> float:
            price = inner.price(view)
            seen.declared.append(price)
            return price

        def init(self) -> State:
            return inner.init()

        def advance(self, view: View, state: State) -> tuple[Values, State]:
            before, done = _surroundings(view), False
            try:
                values, state = inner.advance(view, state)
                done = True
            except Refusal as refusal:
                seen.refusal, seen.refused = str(refusal), seen.refused + 1
                if not str(refusal).strip() or re.match(r"\w*(Error|Exception)\b", str(refusal)):
                    seen.fault(f"refuses without a reason in words: '{refusal}'")
                raise
            except Exception as error:
                seen.fault(f"raises {type(error).__name__}: {error}; expected a Refusal with the reason")
                raise
            finally:
                ran_model = bool(own_needs & RUNS_MODEL) if not done else _counted(view) > 0
                for sentence in _deeds(before, _surroundings(view), ran_model=ran_model):
                    seen.fault(sentence)
            for sentence in value_faults(inner, values, view, healthy=healthy):
                seen.fault(sentence)
            seen.counted.append(_counted(view))
            return values, state

    return Witnessed()


def _counted(view: View) -> float:
    """What the reading has used so far, in g: gradients, and products at their price."""
    meter = view.meter
    if not meter.products:
        return meter.gradients
    aside = View(view._probe, view._needs)  # with a meter of its own
    product: float = max(getattr(aside, need).price for need in view._needs & OPERATORS)
    return meter.gradients + meter.products * product


WORDS: dict[str, str] = {
    "parameters": "writes to parameters",
    "gradients": "writes to gradients",
    "grad": "sets .grad",
    "optimizers": "changes what the optimizer holds",
    "optimizer state": "creates or changes optimizer state",
    "flags": "switches modules between train and eval mode",
    "attributes": "leaves attributes on parameters",
    "hooks": "leaves hooks on modules",
    "tensor hooks": "leaves hooks on parameters",
    "process": "changes a switch of torch (default dtype, grad mode, autocast)",
    "random": "draws from or seeds the global random streams",
    "owned random": "draws from a generator that the model owns",
    "buffers": "writes to buffers",
    "modules": "leaves attributes on modules",
}
BY_THE_MODEL = ("random", "owned random", "buffers", "modules")
"""What a forward may change; the probe puts it back after the readings of the step."""


def _surroundings(view: View) -> dict[str, Any]:
    probe = view._probe
    return {
        **state_of(probe.module, probe.optimizers),
        "gradients": [bits(grad) for grad in probe.grads],
        "process": [torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")],
    }


def _deeds(before: dict[str, Any], after: dict[str, Any], *, ran_model: bool) -> list[str]:
    looked_at = [key for key in WORDS if not (ran_model and key in BY_THE_MODEL)]
    found = {key: differences(before[key], after[key], key) for key in looked_at}
    return [f"{WORDS[key]}: {', '.join(where[:3])}" for key, where in found.items() if where]
