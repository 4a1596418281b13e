"""Where the user's loop stands between two calls: the step being built up and what waits for it to be taken."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, optim

from cockpit_bench.clip_watch import GradientMark
from instruments.objective import Batch


@dataclass
class LoopState:
    """`step` counts optimizer steps taken. A step is observed once, then stepped once by each optimizer."""

    step: int = 0
    begun_at: int = 0  # the step of the start, or of the checkpoint that was resumed
    begun: bool = False
    batches: list[Batch] = field(default_factory=list)
    last: list[Batch] = field(default_factory=list)
    loss: Tensor | float | None = None
    observed: bool = False
    stepping: optim.Optimizer | None = None  # whose step has begun and not ended
    hooked: bool = False  # the hooks of an optimizer have told of a step
    moved_without: int = 0  # times in a row that the parameters moved on without such a step since
    replaced: bool = False  # whether that was too often
    skipping: bool = False
    compared: int = 0  # how often the gradient of the loss that was given was compared with `.grad`
    matched: bool = False  # the last time they were equal
    gradient_factor: float = 1.0
    version: int = 0
    layers: tuple[str, ...] = ()
    stepped: set[int] = field(default_factory=set)
    mark: GradientMark | None = None
    pending: tuple[Any, list[Any]] | None = None
    _troubles: set[str] = field(default_factory=set)

    def take(self, batch: Batch, loss: Tensor | float | None) -> None:
        """Add a micro-batch to the step; the losses of its micro-batches add up, as their gradients do."""
        if not self.batches:
            self.loss = None
        self.batches.append(batch)
        self.last = self.batches
        if loss is not None:
            loss = loss.detach() if isinstance(loss, Tensor) else loss
            self.loss = loss if self.loss is None else self.loss + loss

    def next_step(self) -> None:
        """The optimizer has stepped."""
        self.step += 1
        self.skipping = False
        self._reset()

    def abandon(self) -> None:
        """The step observed was not taken (a GradScaler found infinities, the user skipped it): it does not count."""
        self.skipping = True
        if self.pending is not None:
            self.pending[0].forget()
        self._reset()

    def new_trouble(self, error: Exception) -> bool:
        """True the first time that this kind of error is met."""
        kind = f"{type(error).__name__}: {error}"[:80]
        fresh = kind not in self._troubles
        self._troubles.add(kind)
        return fresh

    def state_dict(self) -> dict[str, Any]:
        """The step, and what is found out once a run."""
        return {name: getattr(self, name) for name in ("step", "compared", "matched", "gradient_factor")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; an older checkpoint does not say whether the gradients matched."""
        self.step = self.begun_at = int(state["step"])
        self.compared, self.matched = int(state["compared"]), bool(state.get("matched"))
        self.gradient_factor = float(state["gradient_factor"])

    def _reset(self) -> None:
        self.batches, self.observed, self.stepped = [], False, set()
        self.mark, self.pending = None, None
