"""A run read back: `run[instrument][output]` is a series on the axes of step and training seconds."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cockpit_bench.notebook import shown
from cockpit_bench.runlog.header import Header
from cockpit_bench.runlog.reading import Event, Metrics, Outcome, Reading, Record


@dataclass(frozen=True, eq=False)
class Series:
    """One output over a run; every field has one entry per reading, taken or not.

    `values` is a float array, NaN where the status is not ok. For an output whose values are arrays it is a list
    of them, None where the status is not ok. `stderr` is NaN where none was given.
    """

    steps: npt.NDArray[np.int64]
    seconds: npt.NDArray[np.float64]
    values: npt.NDArray[np.float64] | list[Any]
    stderr: npt.NDArray[np.float64]
    status: npt.NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.steps)


class Readings(Mapping[str, Series]):
    """Everything one instrument read in a run, by output; `readings` has the records themselves."""

    def __init__(self, instrument: str, readings: Sequence[Reading]) -> None:
        self.instrument = instrument
        self.readings = list(readings)
        self._outputs = tuple(dict.fromkeys(name for reading in readings for name in reading.values))
        self._series: dict[str, Series] = {}

    def __getitem__(self, output: str) -> Series:
        if output not in self._outputs:
            raise _unknown(f"output of {self.instrument}", output, self._outputs)
        if output not in self._series:
            self._series[output] = _series_of(self.readings, output)
        return self._series[output]

    def __iter__(self) -> Iterator[str]:
        return iter(self._outputs)

    def __len__(self) -> int:
        return len(self._outputs)


class _Table(Mapping[str, Series]):
    """Metrics by name, with the same kind of KeyError as instruments."""

    def __init__(self, metrics: Iterable[Metrics]) -> None:
        columns: dict[str, list[tuple[int, float, float]]] = {}
        for record in metrics:
            for name, value in record.values.items():
                columns.setdefault(name, []).append((record.step, record.seconds, value))
        self._series = {name: _complete_series(rows) for name, rows in columns.items()}

    def __getitem__(self, name: str) -> Series:
        if name not in self._series:
            raise _unknown("metric", name, self._series)
        return self._series[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._series)

    def __len__(self) -> int:
        return len(self._series)


@dataclass(frozen=True, eq=False)
class Run(Mapping[str, Readings]):
    """A run folder in memory; what was superseded on resume is gone.

    `trial`, `status` and `environment` are the contents of trial.toml, status.json and env.json, empty where the
    file is missing. `bad_lines` counts lines that were no record: torn ones, usually.
    """

    folder: Path
    header: Header | None
    records: Sequence[Record] = field(repr=False)
    bad_lines: int
    trial: Mapping[str, Any] = field(repr=False)
    status: Mapping[str, Any]
    environment: Mapping[str, Any] = field(repr=False)

    @cached_property
    def _readings(self) -> dict[str, Readings]:
        groups: dict[str, list[Reading]] = {}
        for record in self.records:
            if isinstance(record, Reading):
                groups.setdefault(record.instrument, []).append(record)
        return {name: Readings(name, group) for name, group in groups.items()}

    def __getitem__(self, instrument: str) -> Readings:
        if instrument not in self._readings:
            raise _unknown("instrument", instrument, self._readings)
        return self._readings[instrument]

    def __iter__(self) -> Iterator[str]:
        return iter(self._readings)

    def __len__(self) -> int:
        return len(self._readings)

    @property
    def instruments(self) -> tuple[str, ...]:
        """Labels of the instruments that have at least one record, in order of appearance."""
        return tuple(self._readings)

    @cached_property
    def metrics(self) -> Mapping[str, Series]:
        """Evaluated metrics and the user's own scalars, by name."""
        return _Table(record for record in self.records if isinstance(record, Metrics))

    @cached_property
    def events(self) -> list[Event]:
        """All events, in the order they were written."""
        return [record for record in self.records if isinstance(record, Event)]

    def declared(self, instrument: str) -> Mapping[str, Mapping[str, Any]]:
        """What the log says of its outputs: name -> unit, meaning, kind, edge; empty where it says nothing."""
        instruments = self.header.extra.get("instruments", {}) if self.header is not None else {}
        outputs: Mapping[str, Mapping[str, Any]] = instruments.get(instrument, {}).get("outputs", {})
        return outputs

    def unit(self, instrument: str, output: str) -> str:
        """The declared unit; nothing for a pure number."""
        text = str(self.declared(instrument).get(output, {}).get("unit", ""))
        return "" if text == "1" else text

    def plot(self, instrument: str | None = None) -> Any:
        """The panel picture, or everything that one instrument read, as a matplotlib Figure (a notebook shows it).

        The panel has 1600 x 1000 pixels, the picture of an instrument as many as its outputs need. KeyError with the
        nearest labels for an instrument that the run does not have.
        """
        from cockpit_bench.plots.instrument import instrument_figure  # matplotlib is imported by who draws
        from cockpit_bench.plots.panel import panel

        return shown(panel(self) if instrument is None else instrument_figure(self, instrument))

    def _repr_html_(self) -> str:
        """What a notebook shows of a run: no picture, and nothing to install for it."""
        from cockpit_bench.runlog.page import page  # which imports this module

        return page(self)

    @property
    def outcome(self) -> Outcome | None:
        """How the run ended; None while it goes on, or when it was killed."""
        return next((record for record in reversed(self.records) if isinstance(record, Outcome)), None)


def _unknown(what: str, name: str, known: Iterable[str]) -> KeyError:
    names = list(known)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    advice = f"nearest: {', '.join(near)}" if near else f"this run has: {', '.join(names) or 'none'}"
    return KeyError(f"no {what} is called {name!r} in this run; {advice}")


def _series_of(readings: Sequence[Reading], output: str) -> Series:
    values = [reading.values.get(output) if reading.status == "ok" else None for reading in readings]
    column: npt.NDArray[np.float64] | list[Any]
    if any(isinstance(value, list | np.ndarray) for value in values):
        column = [None if value is None else _as_array(value) for value in values]
    else:
        column = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    return Series(
        steps=np.array([reading.step for reading in readings], dtype=np.int64),
        seconds=np.array([reading.seconds for reading in readings], dtype=np.float64),
        values=column,
        stderr=np.array([reading.stderr.get(output, np.nan) for reading in readings], dtype=np.float64),
        status=np.array([reading.status for reading in readings], dtype=np.str_),
    )


def _as_array(value: Any) -> Any:
    """Small arrays come out of the log as lists; a ragged one stays a list."""
    try:
        return np.asarray(value)
    except ValueError:
        return value


def _complete_series(rows: Sequence[tuple[int, float, float]]) -> Series:
    steps, seconds, values = zip(*rows, strict=True)
    return Series(
        steps=np.array(steps, dtype=np.int64),
        seconds=np.array(seconds, dtype=np.float64),
        values=np.array(values, dtype=np.float64),
        stderr=np.full(len(rows), np.nan),
        status=np.full(len(rows), "ok"),
    )
