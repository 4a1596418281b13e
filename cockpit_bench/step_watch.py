"""Knows when an optimizer step begins and ends, by the hooks of torch's optimizers, and nothing else.

The hooks sit on the optimizers (which do not pickle or copy them), refer weakly to the cockpit, and go with it. In a
forked child they do nothing.
"""

import os
import sys
import weakref
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Protocol

import torch
from torch import optim

STEP = optim.Optimizer.profile_hook_step(lambda *args: None).__code__  # what torch wraps round every class's step


class StepListener(Protocol):
    """What the cockpit does when a step begins, and when the last of its optimizers has ended one."""

    def step_begins(self, optimizer: optim.Optimizer) -> None: ...

    def step_ends(self, optimizer: optim.Optimizer) -> None: ...


class StepWatch:
    """`hooked` is False when an optimizer has none of torch's hooks: its step is then noticed at the next observe."""

    def __init__(self, optimizers: Sequence[Any], listener: StepListener) -> None:
        self._handles: list[Any] = []
        self.hooked = True
        try:
            for optimizer in optimizers:
                self._handles.append(optimizer.register_step_pre_hook(_weak(listener.step_begins)))
                self._handles.append(optimizer.register_step_post_hook(_weak(listener.step_ends)))
        except AttributeError:  # no hooks, or a wrapper that never set them up
            self.close()

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.hooked = [], False


def _weak(method: Callable[[optim.Optimizer], None]) -> Callable[..., None]:
    """A compiled step calls it and does not look into it: what runs the model in there could not be compiled."""
    reference, process = weakref.WeakMethod(method), os.getpid()

    def hook(optimizer: optim.Optimizer, args: Any, kwargs: Any) -> None:
        alive = reference()
        if alive is not None and os.getpid() == process and running_steps(optimizer) <= 1:
            alive(optimizer)

    unseen: Callable[..., None] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return unseen


def running_steps(optimizer: optim.Optimizer) -> int:
    """How many calls of its step are running at this moment: none where one has raised, two where a class calls the
    step of its parent, which torch has given the same hooks."""
    count = 0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is STEP and frame.f_locals.get("self") is optimizer:
            count += 1
        frame = frame.f_back
    return count


def as_optimizers(given: Any) -> tuple[Any, ...]:
    """One optimizer or several as a tuple; ValueError for what is none."""
    optimizers = tuple(given) if isinstance(given, list | tuple) else (given,)
    for optimizer in optimizers:
        if not hasattr(optimizer, "param_groups") or not callable(getattr(optimizer, "step", None)):
            raise ValueError(f"expected an optimizer (param_groups, step()) or several, got {optimizer!r}")
    if not optimizers:
        raise ValueError("expected at least one optimizer, got an empty sequence.")
    return optimizers


def refuse_strangers(optimizers: Sequence[Any], params: Sequence[Any]) -> None:
    """ValueError when no optimizer holds any parameter of the model: every reading of the step would be a zero."""
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    if not held & {id(p) for p in params}:
        raise ValueError(
            "expected an optimizer that holds parameters of the model, got one that holds none of them (of another "
            "model, or of this one before its layers were replaced?); make the optimizer from this model's parameters."
        )
