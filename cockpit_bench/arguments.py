"""What a `Cockpit` is given, looked at before anything is made of it: what was expected, what came, what to write."""

import operator
from collections.abc import Sequence
from typing import Any

from torch import nn

from cockpit_bench.sinks import Sink
from workloads.target import Target


def refuse_misuse(model: Any, target: Any, steps: Any, accumulate: Any, sinks: Any) -> None:
    """ValueError for what would fail later, or in words that say nothing of the cause."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"expected the model, an nn.Module, first, got {_kind(model)}; pass the module itself, not its parameters."
        )
    if target is not None and not isinstance(target, Target):
        raise ValueError(
            f"expected target as at_least(metric, value) or at_most(metric, value), got {target!r}; "
            'write for example target=at_least("accuracy", 0.9).'
        )
    if steps is not None and not _counts(steps):
        raise ValueError(
            f"expected steps, the planned length of the run, as a whole number of at least 1, got {steps!r}; "
            "leave it out where nobody knows it."
        )
    if not _counts(accumulate):
        raise ValueError(f"expected accumulate (micro-batches of a step) to be a whole number >= 1, got {accumulate!r}")
    if sinks is not None:
        _refuse_sinks(sinks)


def _counts(number: Any) -> bool:
    """Whether it is a whole number of at least 1, NumPy's included."""
    try:
        return operator.index(number) >= 1 and not isinstance(number, bool)
    except TypeError:
        return False


def _refuse_sinks(sinks: Any) -> None:
    given = sinks if isinstance(sinks, Sequence) and not isinstance(sinks, str) else [sinks]
    for sink in given:
        if not isinstance(sink, Sink) and not callable(sink):
            raise ValueError(
                f"expected sinks as a list of sinks (cockpit_bench.sinks) or functions of a record, got {sink!r}; "
                "sinks=[ConsoleSink(), print] for example, or leave it out for console and log."
            )
    if given is not sinks:
        raise ValueError(f"expected sinks as a list, got {_kind(sinks)}; write sinks=[...].")


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
