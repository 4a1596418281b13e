"""The records of a run log, all on one axis: `step` counts optimizer steps, `seconds` is training time so far.

Time spent observing, evaluating, logging and checkpointing is not part of `seconds`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Value = float | int | list[Any] | npt.NDArray[np.generic]
Fact = str | int | float | bool | list[str] | None
Status = Literal["ok", "skipped", "failed"]
Source = Literal["evaluation", "user"]
Ending = Literal["hit", "miss", "done", "diverged", "out_of_memory", "error", "timeout", "interrupted"]


@dataclass(frozen=True)
class Reading:
    """What one instrument read at one step, what it cost, and which gradient and batch it was about.

    `step` is the number of the step about to be taken. `values` and `stderr` are keyed by output name; `cost` has
    `seconds`, `products` (operator-vector products) and `gradients` (forward + backward passes). A reading that was
    due but not taken is `skipped`, one that broke is `failed`; both say why in `reason`. Values with one entry a module
    are in the order of the names in `provenance["modules"]`.
    """

    instrument: str
    step: int
    seconds: float
    status: Status
    values: Mapping[str, Value] = field(default_factory=dict)
    stderr: Mapping[str, float] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, Fact] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Metrics:
    """Scalars that came from outside the instruments: an evaluation of the model, or the user's own numbers."""

    step: int
    seconds: float
    values: Mapping[str, float]
    source: Source


@dataclass(frozen=True)
class Event:
    """Something that happened once, such as `clip`, `target_hit`, `retired`.

    `superseded` with detail `{"from_step": n}` is written on resume: records written before it with step >= n, and
    every earlier outcome, belong to a past that was taken back.
    """

    step: int
    seconds: float
    name: str
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How the run ended. `step` and `seconds` are where it stopped, `hit_*` where the target was first reached.

    "done" is the end of a run that had no target. `buckets` splits `wall` (seconds) by activity; `tax` is the seconds
    that each instrument took, `skips` how many of its due readings were not paid for.
    """

    status: Ending
    step: int
    seconds: float
    hit_step: int | None
    hit_seconds: float | None
    best: float | None
    reason: str
    buckets: Mapping[str, float]
    wall: float
    tax: Mapping[str, float]
    skips: Mapping[str, int] = field(default_factory=dict)


Record = Reading | Metrics | Event | Outcome
