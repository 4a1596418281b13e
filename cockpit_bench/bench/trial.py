"""One frozen description of a run; its hash names its folder, and the same trial is not run twice."""

import hashlib
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from cockpit_bench import panels
from instruments.catalogue import nearest

HASH_LENGTH = 10


@dataclass(frozen=True)
class Trial:
    """What is trained, how, and what is read. Everything that a repetition needs, and nothing else.

    `hyperparameters` override the workload's baseline for the algorithm. `steps` and `batch_size` override the
    workload's; `panel` names the instruments, whose cadences are functions of the step, so that a trial repeats
    exactly. `stop_at_target` ends the run at the first hit.
    """

    workload: str
    algorithm: str = "adam"
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    panel: str | None = "standard"
    steps: int | None = None
    batch_size: int | None = None
    stop_at_target: bool = False
    timeout_seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"expected {name} to be a whole number >= 1, got {value!r}; a batch cannot be empty.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"expected the seed to be a whole number >= 0, got {self.seed!r}.")
        panels.members(self.panel)
        if self.timeout_seconds is not None and not self.timeout_seconds > 0:
            raise ValueError(f"expected timeout_seconds > 0, got {self.timeout_seconds!r}.")

    @property
    def hash(self) -> str:
        """Ten hexadecimal digits of the description; equal trials have equal hashes on every machine."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), default=list)
        return hashlib.sha256(text.encode()).hexdigest()[:HASH_LENGTH]

    def to_toml(self) -> str:
        """The trial file: every field that is set."""
        lines: list[str] = []
        table: Mapping[str, Any] = {}
        for name, value in asdict(self).items():
            if isinstance(value, Mapping):
                table = value
            elif value is not None:
                lines.append(f"{name} = {_toml(value)}")
        if self.panel is None:
            lines.append('panel = "none"')
        if table:
            lines.append("\n[hyperparameters]")
            lines += [f"{name} = {_toml(value)}" for name, value in table.items()]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_toml(cls, path: Path) -> "Trial":
        """Read a trial file; unknown keys are errors that name the nearest valid one."""
        with path.open("rb") as file:
            values = tomllib.load(file)
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(f"expected a field of a trial in {path}, got '{key}'; {nearest(key, known)}.")
        if values.get("panel") == "none":
            values["panel"] = None
        return cls(**values)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else "nan" if math.isnan(value) else f"{'-' * (value < 0)}inf"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    raise ValueError(f"expected a number, text, true/false or a list of them in a trial, got {value!r}.")
