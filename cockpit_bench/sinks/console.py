"""The run in one line: where it is, how it stands against its target, what the main instruments say."""

import io
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Protocol, TextIO

from cockpit_bench.runlog import Event, Metrics, Outcome, Reading, Record
from cockpit_bench.sinks.sink import Sink
from cockpit_bench.sinks.summary import Faults, details, finite, number, ratio, summary

_TERMINAL_SECONDS = 0.2
_PLAIN_SECONDS = 5.0
_ROUTINE_EVENTS = ("clip", "skipped_step", "data", "trial", "layers")
# label on the line, instrument, output; in the order of the line
_LOSS = ("loss", "batch/loss", "loss")
_PICKS = (("rho", "curvature/preconditioned_sharpness", "rho"), ("noise", "gradient/noise_scale", "noise_scale"))


class Target(Protocol):
    """What the console needs to know of a target; its `str` is shown in the summary."""

    @property
    def metric(self) -> str: ...

    @property
    def value(self) -> float: ...


class ConsoleSink(Sink):
    """Prints progress: on a terminal one line that updates itself, elsewhere a plain line now and then.

    At most one line per `every_seconds` (0.2 on a terminal, 5 elsewhere), besides one for every evaluation and for
    every event that is not routine. `interactive` draws the updating line on a stream that is not a terminal but
    understands a carriage return (a notebook). The stream is stderr unless told: results on stdout stay clean. The run
    ends with a block of text (`summary`); `folder` is where it says that the log is.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        target: Target | None = None,
        steps: int | None = None,
        every_seconds: float | None = None,
        interactive: bool = False,
        folder: str | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream or sys.stderr or io.StringIO()  # a program may have closed its stderr
        self._terminal = interactive or self._stream.isatty()
        default = _TERMINAL_SECONDS if self._terminal else _PLAIN_SECONDS
        self._interval = default if every_seconds is None else every_seconds
        self._state = _State(target, steps)
        self._goal, self._folder, self._faults = None if target is None else str(target), folder, Faults()
        self._now = now
        self._printed = -math.inf
        self._open_line = False

    def write(self, record: Record) -> None:
        moment = self._now()
        self._state.take(record, moment)
        self._faults.take(record)
        if isinstance(record, Outcome):
            for line in summary(record, self._goal, self._faults, self._folder):
                self._print_above(line)
            return
        if isinstance(record, Event) and record.name not in _ROUTINE_EVENTS:
            self._print_above(f"step {record.step}: {record.name} {details(record.detail)}")
        evaluated = isinstance(record, Metrics) and record.source == "evaluation"
        if evaluated or moment - self._printed >= self._interval:
            self._printed = moment
            self._update(self._state.line(moment))

    def close(self) -> None:
        if self._open_line:
            self._open_line = False
            self._put("\n")

    def _update(self, text: str) -> None:
        if self._terminal:
            self._open_line = True
            self._put("\r" + self._fitted(text))
        else:
            self._put(_printable(text) + "\n")

    def _print_above(self, text: str) -> None:
        """A line that stays. On a terminal it takes the place of the updating one, which follows below."""
        if self._open_line:
            self._open_line = False
            self._put("\r" + self._fitted("") + "\r")
        self._put(_printable(text) + "\n")

    def _fitted(self, text: str) -> str:
        """Cut and padded to the terminal, short of the last column, where some terminals wrap."""
        try:
            width = os.get_terminal_size(self._stream.fileno()).columns or 80
        except (OSError, ValueError, AttributeError):
            width = 80
        return _printable(text)[: width - 1].ljust(width - 1)

    def _put(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            self._stream.write(text.encode("ascii", "backslashreplace").decode("ascii"))
        self._stream.flush()


class _State:
    """What the records so far amount to, as text."""

    def __init__(self, target: Target | None, steps: int | None) -> None:
        self._target = target
        self._steps = steps
        self._step = 0
        self._seconds = 0.0
        self._begin: tuple[float, int, float] | None = None
        self._paid = 0.0
        self._picks: dict[str, tuple[str, int]] = {}  # value and the step that it was read at
        self._metrics: dict[str, str] = {}
        self._hit: str | None = None

    def take(self, record: Record, moment: float) -> None:
        self._step, self._seconds = record.step, record.seconds
        if self._begin is None:
            self._begin = (moment, record.step, record.seconds)
        if isinstance(record, Reading):
            self._paid += finite(record.cost.get("seconds")) or 0.0
            self._take_values(record)
        elif isinstance(record, Metrics) and record.source == "evaluation":
            self._metrics.update({name: number(value) for name, value in record.values.items()})
        elif isinstance(record, Event) and record.name == "target_hit":
            self._hit = f"hit at step {record.step} ({number(record.seconds)} s)"

    def _take_values(self, reading: Reading) -> None:
        if reading.status != "ok":
            return
        for label, instrument, output in (_LOSS, *_PICKS):
            if reading.instrument == instrument and output in reading.values:
                self._picks[label] = (number(reading.values[output]), reading.step)

    def line(self, moment: float) -> str:
        parts = [f"step {self._step}" + (f"/{self._steps}" if self._steps else "")]
        parts += self._picked(_LOSS) + self._standing()
        for pick in _PICKS:
            parts += self._picked(pick)
        tax = self._tax()
        if tax is not None:
            parts.append(f"tax {tax:.1%}")
        remaining = self._remaining(moment)
        if remaining is not None:
            parts.append(f"eta {_duration(remaining)}")
        return "  ".join(parts)

    def _picked(self, pick: tuple[str, str, str]) -> list[str]:
        """A value with its step where that is more than one step ago: an old number must not look like a new one."""
        label = pick[0]
        if label not in self._picks:
            return []
        text, step = self._picks[label]
        return [f"{label} {text}" + (f"@{step}" if self._step - step > 1 else "")]

    def _standing(self) -> list[str]:
        if self._target is None:
            return [f"{name} {text}" for name, text in self._metrics.items()]
        parts = []
        if self._target.metric in self._metrics:
            goal = number(self._target.value)
            parts.append(f"{self._target.metric} {self._metrics[self._target.metric]} (target {goal})")
        return parts + ([self._hit] if self._hit else [])

    def _tax(self) -> float | None:
        if self._begin is None or not self._paid:
            return None
        return ratio(self._paid, self._seconds - self._begin[2])

    def _remaining(self, moment: float) -> float | None:
        """By the wall clock, so that it includes what evaluation and observation take."""
        if self._begin is None or not self._steps or self._step >= self._steps:
            return None
        pace = ratio(moment - self._begin[0], self._step - self._begin[1])
        return None if pace is None else pace * (self._steps - self._step)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)
