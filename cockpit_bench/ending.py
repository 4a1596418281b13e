"""How a run ends: the target, when it was hit, and the outcome."""

import atexit
import math
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cockpit_bench.clock import Clock
from cockpit_bench.runlog import Outcome
from cockpit_bench.runlog.reading import Ending as Status
from workloads.target import Target


class Ending:
    """Watches the evaluations against the target. The first hit counts; a NaN never hits."""

    def __init__(self, target: Target | None) -> None:
        self.target = target
        self.hit_step: int | None = None
        self.hit_seconds: float | None = None
        self.best: float | None = None
        self.logged: set[str] = set()
        self.outcome: Outcome | None = None
        self.last_loss: Tensor | float | None = None  # read only when the run is closed

    def evaluated(self, metrics: Mapping[str, float], step: int, seconds: float) -> bool:
        """True when these metrics reach the target for the first time."""
        self.logged.update(metrics)
        if self.target is None or self.target.metric not in metrics:
            return False
        value = metrics[self.target.metric]
        if not math.isnan(value) and (self.best is None or self.target.better(value, self.best)):
            self.best = value
        if self.hit_step is not None or not self.target.reached(value):
            return False
        self.hit_step, self.hit_seconds = step, seconds
        return True

    def close(self, clock: Clock, step: int, status: Status | None, reason: str, skips: Mapping[str, int]) -> Outcome:
        """The outcome: what was said, else hit, diverged, miss, or done where no target was set."""
        if status is None:
            status, reason = self._judged(reason)
        self.outcome = Outcome(
            status=status,
            step=step,
            seconds=clock.training,
            hit_step=self.hit_step,
            hit_seconds=self.hit_seconds,
            best=self.best,
            reason=reason,
            buckets={**clock.seconds, "other": clock.other},
            wall=clock.wall,
            tax=clock.tax,
            skips=skips,
        )
        return self.outcome

    def _judged(self, reason: str) -> tuple[Status, str]:
        if self.hit_step is not None:
            return "hit", reason
        if self.last_loss is not None and not math.isfinite(float(self.last_loss)):
            return "diverged", reason or f"the training loss is {float(self.last_loss)}"
        if self.target is None:
            return "done", reason
        if self.best is None and not reason:
            logged = ", ".join(sorted(self.logged)) or "nothing"
            reason = f"'{self.target.metric}' was never logged inside evaluating(); logged was {logged}"
        return "miss", reason

    def state_dict(self) -> dict[str, Any]:
        return {"hit_step": self.hit_step, "hit_seconds": self.hit_seconds, "best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.hit_step, self.hit_seconds, self.best = state["hit_step"], state["hit_seconds"], state["best"]


class AtExit:
    """Ends a run that nobody closed, when the interpreter ends: the log says how it ended.

    The method is held weakly, since being remembered here must not keep a model alive, and an error that is older than
    the run is not what ended it.
    """

    def __init__(self, close: Callable[[Status | None, str], object]) -> None:
        self._close, self._earlier_error = weakref.WeakMethod(close), id(last_error())
        atexit.register(self)

    def __call__(self) -> None:
        close, error = self._close(), last_error()
        if close is not None:
            close(*status_of(None if id(error) == self._earlier_error else error))

    def cancel(self) -> None:
        """The run was closed."""
        atexit.unregister(self)


def last_error() -> BaseException | None:
    """The exception that ended the program; in an interactive session, the last one that was shown."""
    return getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)


def status_of(error: BaseException | None) -> tuple[Status | None, str]:
    """The outcome that an exception which ends a run stands for, and its reason."""
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return None, ""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", "KeyboardInterrupt"
    out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return "out_of_memory" if out_of_memory else "error", f"{type(error).__name__}: {error}"
