"""Two observed runs held against each other, output by output, over the whole catalogue.

Shapes: S = readings.
"""

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from loop_cases import Case, Training, adam
from refusals import expected_refusals
from torch import nn
from watching import EVERYTHING, events, readings, watch

from cockpit_bench import Cockpit

ERRORS = ("/residual", "/rounding")
OTHER_CURVATURE = {name for name in EVERYTHING if name.startswith("curvature/")} - {
    f"curvature/{one}" for one in ("sharpness", "preconditioned_sharpness", "smallest")
}
"""Estimated from random vectors, which depend on size and precision, or told by parameter tensor."""
Loop = Callable[[Training, Cockpit, int], None]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


ADAM = Case("adam", net, adam)


def plain_step(training: Training, cockpit: Cockpit, step: int) -> None:
    for micro in range(training.case.accumulate):
        cockpit.observe(*training.backward(step, micro))
    training.take_step()


def observed(training: Training, loop: Loop = plain_step, *, steps: int = 2, **settings: Any) -> Cockpit:
    """Every instrument at every step of a loop, which takes one step at a time."""
    cockpit = watch(training, **settings)
    for step in range(steps):
        loop(training, cockpit, step)
    cockpit.close()
    return cockpit


def refused(cockpit: Cockpit) -> dict[str, str]:
    return {r.instrument: r.reason for r in readings(cockpit, status="failed")}


def table(cockpit: Cockpit) -> dict[str, tuple[np.ndarray, float]]:
    """`label/output` to all its values in a row, and its largest standard error."""
    rows: dict[str, list[Any]] = {}
    errors: dict[str, float] = {}
    for reading in readings(cockpit, status="ok"):
        for output, value in reading.values.items():
            name = f"{reading.instrument}/{output}"
            rows.setdefault(name, []).append(np.atleast_1d(np.asarray(value, float)).ravel())
            error = reading.stderr.get(output, 0.0)
            errors[name] = max(errors.get(name, 0.0), error if np.isfinite(error) else 0.0)
    return {name: (np.concatenate(row), errors[name]) for name, row in rows.items()}


def apart(one: Cockpit, other: Cockpit, *, rel: float, but: Collection[str] = ()) -> dict[str, Any]:
    """Outputs of both that differ by more than `rel` of their size and their standard errors, NaN equal to itself.

    `but` names outputs, or instruments, that are left out; so are residuals and roundings, which are errors themselves.
    """
    left, right = table(one), table(other)
    found = {}
    for name in left.keys() & right.keys():
        if name in but or name.rpartition("/")[0] in but or name.endswith(ERRORS):
            continue
        (a, error), (b, other_error) = left[name], right[name]
        room = rel * _size(a) + max(error, other_error)
        if a.shape != b.shape or not np.allclose(a, b, rtol=rel, atol=room, equal_nan=True):
            found[name] = (a, b)
    return found


def _size(a: np.ndarray) -> float:
    finite = np.abs(a[np.isfinite(a)])
    return float(finite.max()) if len(finite) else 0.0


def same_refusals(cockpit: Cockpit, training: Training) -> None:
    """Neither more nor less is refused than of any training like this one."""
    assert set(refused(cockpit)) == expected_refusals(training)
    assert not events(cockpit, "observe_failed")
    assert {r.instrument for r in readings(cockpit, status="ok")} == set(EVERYTHING) - expected_refusals(training)
