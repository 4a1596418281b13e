"""Do values match what the instrument declares of them?

Shapes: L = trained parameter tensors, G = parameter groups, K = bins.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cockpit_bench.readout import plain_values
from instruments.instrument import Instrument, Output
from instruments.view import View

Array = npt.NDArray[Any]


def value_faults(instrument: Instrument, values: Any, view: View, *, healthy: bool = True) -> list[str]:
    """What is wrong with the values of one reading, a sentence each; empty when they are as declared.

    In `healthy` training what is not finite must have been declared so.
    """
    if not isinstance(values, Mapping):
        return [f"expected a mapping of values by output, got {type(values).__name__}"]
    try:
        plain, stderr = plain_values(instrument, values)
    except Exception as error:
        return [f"values cannot be logged: {error}"]
    found = [f"standard error of '{name}' is {error}, below zero" for name, error in stderr.items() if error < 0]
    for name, value in plain.items():
        output = instrument.outputs[name]
        if not isinstance(value, float | int | np.ndarray):
            found.append(f"'{name}' is a {type(value).__name__}; expected a number, a tensor or an array")
        elif fault := _shape_fault(np.asarray(value), output, view):
            found.append(f"'{name}', declared {output.kind}, {fault}")
        elif healthy and (fault := _not_finite(value, output, instrument)):
            found.append(f"'{name}' {fault}")
    return found


def _shape_fault(value: Array, output: Output, view: View) -> str:
    match str(output.kind):
        case "scalar":
            return "" if value.ndim == 0 else f"has shape {value.shape}; expected one number"
        case "per-layer":
            return _counted(value, len(view.layout.names), "trained parameter tensors")
        case "per-group":
            return _counted(value, _groups(view), "parameter groups")
        case "per-module":
            names = view.meter.provenance.get("modules")
            if names is None:
                return "comes without names; set view.meter.provenance['modules']"
            return _counted(value, len(names), "modules named in the provenance")
        case "histogram":
            return _histogram_fault(value)
        case "grid":
            return _grid_fault(value)
        case _:
            return "" if value.ndim == 2 and len(value) == 2 else f"has shape {value.shape}; expected (2, K)"


def _counted(value: Array, expected: int, what: str) -> str:
    return "" if value.shape == (expected,) else f"has shape {value.shape}; expected ({expected},), the {what}"


def _groups(view: View) -> int:
    return sum(len(optimizer.param_groups) for optimizer in view._probe.optimizers)


def _histogram_fault(value: Array) -> str:
    if value.ndim != 2 or len(value) != 2 or not value.size:
        return f"has shape {value.shape}; expected (2, K): limits, counts"
    limits_K, counts_K = value
    if not _ascending(limits_K):
        return f"has limits that do not ascend: {limits_K}"
    return _counts_fault(counts_K)


def _grid_fault(value: Array) -> str:
    """(1 + R, 1 + C): limits of the columns in the first row, of the rows in the first column, counts inside."""
    if value.ndim != 2 or min(value.shape) < 2:
        return f"has shape {value.shape}; expected limits and counts, at least (2, 2)"
    if not (_ascending(value[0, 1:]) and _ascending(value[1:, 0])):
        return "has limits that do not ascend"
    return _counts_fault(value[1:, 1:])


def _ascending(limits: Array) -> bool:
    return bool((limits[1:] > limits[:-1]).all() and np.isfinite(limits[:-1]).all() and not np.isnan(limits[-1]))


def _counts_fault(counts: Array) -> str:
    whole = np.isfinite(counts).all() and (counts >= 0).all() and (counts == np.round(counts)).all()
    return "" if whole else "has counts that are no whole numbers from 0 on"


def _not_finite(value: Any, output: Output, instrument: Instrument) -> str:
    """A number that may be NaN or infinite in healthy training is declared as such, in its meaning or the docstring."""
    if str(output.kind) in ("histogram", "grid") or np.isfinite(value).all():
        return ""
    if re.search(r"NaN|infinit|\binf\b", f"{output.meaning} {type(instrument).__doc__}"):
        return ""
    return "is not finite; where a value may be NaN or infinite its meaning or the class docstring says so"
