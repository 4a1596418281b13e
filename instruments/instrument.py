"""What an instrument is: frozen settings, declared outputs, and one reading of a probe.

An instrument lives in one file of a family folder (`gradient/`, `curvature/`, `step/`, `batch/`); the name
`family/file` is its only registration. It declares, as class attributes, what it gives (`outputs`), what it asks of the
probe (`needs`), and where its formula comes from (`reference`); `price` says what one reading costs.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from instruments.view import Need, View

Kind = Literal["scalar", "per-group", "per-layer", "per-module", "histogram", "spectrum", "grid"]


@dataclass(frozen=True)
class Output:
    """One declared value of an instrument.

    `unit` is "1" for a pure number. `kind` decides how the value is drawn and tagged: a scalar is a curve, a per-group
    value one curve a parameter group, a per-layer value one a trained parameter tensor, a per-module value one a
    module, whose names stand in `view.meter.provenance["modules"]`. `edge` is a value on whose sides the
    reading means something else (1 for rho, 0 for a trace), no mere bound of it, and is drawn as a line.

    A histogram is an array (2, K): ascending upper limits of the bins, the last may be infinite, over their counts. A
    spectrum is (2, K): a grid over values. A grid is (R + 1, C + 1): upper limits of the columns in [0, 1:], of the
    rows in [1:, 0], counts in the rest.
    """

    unit: str
    meaning: str
    kind: Kind = "scalar"
    edge: float | None = None


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error, in the unit of the value; NaN where the error is not known yet."""

    value: "Scalar"
    stderr: "Scalar"


Scalar = float | Tensor
Value = Scalar | Estimate | npt.NDArray[np.float64]
Values = Mapping[str, Value]
State = dict[str, Any]


class Instrument(ABC):
    """Abstract: turns a probe, and what it remembers, into values.

    `init()` makes the memory of a new run and `advance(view, state)` returns the values and the next memory; the memory
    is a flat dictionary of tensors, numbers and lists, so that it goes through `torch.save` with the rest of a
    checkpoint. Settings never change after construction.

    An instrument that cannot read raises `Refusal` with the reason; the cockpit logs it and training goes on.
    """

    outputs: ClassVar[Mapping[str, Output]]
    needs: ClassVar[frozenset[Need]]
    reference: ClassVar[str]

    @abstractmethod
    def price(self, view: View) -> float:
        """Expected cost of one reading in g, one gradient (forward + backward) on the batch that it reads.

        0 for what does not run the model and takes a small part of a step.
        """

    @abstractmethod
    def init(self) -> State:
        """The memory of a run that has not been read yet."""

    @abstractmethod
    def advance(self, view: View, state: State) -> tuple[Values, State]:
        """One reading: the declared values and the memory for the next one."""


class Gauge(Instrument):
    """Abstract: an instrument without memory. Write `read(view)`; the rest follows."""

    @abstractmethod
    def read(self, view: View) -> Values:
        """The declared values of this step."""

    def init(self) -> State:
        return {}

    def advance(self, view: View, state: State) -> tuple[Values, State]:
        return self.read(view), state
