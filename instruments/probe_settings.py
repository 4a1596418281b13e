"""How a step is looked at: in which mode, by which engine, under which seed, and which of its parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from instruments.running import Mode
from instruments.samples.moments import EngineName


@dataclass(frozen=True)
class ProbeSettings:
    """How a step is looked at. The seed pins the random numbers of every forward of a reading.

    `parameters` restricts every reading to the parameters whose names match one of these patterns (as of a shell):
    ("*.lora_*",) for adapters, ("embed.*",) for embeddings.
    """

    mode: Mode = "train"
    samples: EngineName = "auto"
    seed: int = 0
    parameters: str | Sequence[str] | None = None

    @property
    def patterns(self) -> tuple[str, ...] | None:
        """The patterns as a tuple; None where all trained parameters are read."""
        if self.parameters is None:
            return None
        return (self.parameters,) if isinstance(self.parameters, str) else tuple(self.parameters)

    def __post_init__(self) -> None:
        for name, kind in (("mode", Mode), ("samples", EngineName)):
            if getattr(self, name) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise ValueError(f"expected {name} to be one of {known}, got {getattr(self, name)!r}")
