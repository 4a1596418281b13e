"""The cockpit: wrapped round a training loop, it reads the panel, keeps the clock and writes the log.

    cockpit = Cockpit(model, optimizer, loss=nn.CrossEntropyLoss(), logdir="runs/first")
    for x, y in loader:
        loss = loss_fn(model(x), y)
        loss.backward()
        cockpit.observe((x, y), loss)          # after backward, before the optimizer's step
        optimizer.step()
        optimizer.zero_grad()
    cockpit.close()

Three promises: observation never changes training; an instrument never stops training; no number without its doubt.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn, optim

from cockpit_bench.arguments import refuse_misuse
from cockpit_bench.cadence import Budget
from cockpit_bench.clock import Clock
from cockpit_bench.ending import AtExit, Ending, status_of
from cockpit_bench.observer import Observer
from cockpit_bench.on_demand import read_now
from cockpit_bench.panels import assemble, declared
from cockpit_bench.prices import NOTHING, Prices, price_list
from cockpit_bench.probes import Probes
from cockpit_bench.readout import Readout
from cockpit_bench.recorder import Recorder
from cockpit_bench.runlog import Metrics, Outcome, Reading, Record
from cockpit_bench.runlog.reading import Ending as Status
from cockpit_bench.sinks import Sink
from cockpit_bench.step_watch import as_optimizers, refuse_strangers
from instruments.held import HeldBatches
from instruments.instrument import Instrument
from instruments.layout import Layout
from instruments.objective import Batch, Losses, as_objective
from instruments.probe_settings import ProbeSettings
from instruments.running import unwrapped
from workloads.target import Target


class Cockpit:
    """See the module for the loop, and docs/architecture.md for the whole contract.

    `loss` is an nn loss module on (inputs, targets) or a function losses(call, batch) -> losses_N, where call is the
    model's forward. `logdir=None` keeps everything in memory. `panel` and `instruments` say what is read and when,
    `probe` which batches curvature is read on, `budget` which share of the training time may be spent. `steps` is the
    planned length of the run: it spreads the readings and gives the ETA. `interactive=True` draws the one updating
    status line even where the output is not a terminal. `strict=True` raises what would be logged. `parameters`, name
    patterns as of a shell ("*.lora_*", or several), restricts every reading to the parameters that match one. Of
    several processes rank 0 alone writes and speaks; all of them read.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer | Sequence[optim.Optimizer],
        *,
        loss: nn.Module | Losses,
        logdir: str | os.PathLike[str] | None = None,
        resume: bool = False,
        panel: str | Mapping[str, Any] | None = "standard",
        instruments: Mapping[str, Any] | None = None,
        probe: Iterable[Batch] | None = None,
        budget: float | None = 0.05,
        target: Target | None = None,
        steps: int | None = None,
        accumulate: int = 1,
        scaler: Any = None,
        sinks: Sequence[Sink | Callable[..., None]] | None = None,
        interactive: bool = False,
        strict: bool = False,
        parameters: str | Sequence[str] | None = None,
        settings: ProbeSettings | None = None,
        enabled: bool = True,
    ) -> None:
        self.enabled = enabled and not off()
        if not self.enabled:
            self.clock = Clock()
            return
        refuse_misuse(model, target, steps, accumulate, sinks)
        objective, optimizers = as_objective(loss), as_optimizers(optimizer)
        settings = settings or ProbeSettings()
        if parameters is not None:
            settings = replace(settings, parameters=parameters)
        layout = Layout.of(unwrapped(model), settings.patterns)
        refuse_strangers(optimizers, layout.params)
        self._device = layout.device
        self.clock = Clock(sync=partial(torch.cuda.synchronize, self._device) if self._device.type == "cuda" else None)
        slots, purse, held = assemble(panel, instruments, steps), Budget(budget), HeldBatches(probe)
        probes = Probes(model, objective, optimizers, held=held, settings=settings, scaler=scaler)
        about = {"target": None if target is None else asdict(target), "steps": steps, "instruments": declared(slots)}
        self._recorder = Recorder(
            self.clock, logdir, resume, sinks, target, steps, interactive=interactive, about=about
        )
        self._readout = Readout(slots, purse, self.clock, self._recorder.write, strict=strict)
        self._observer = Observer(
            probes, self._readout, self._recorder, clock=self.clock, accumulate=accumulate, strict=strict
        )
        self._ending, self._steps, self._accumulate = Ending(target), steps, accumulate
        self._closed, self._at_exit = False, AtExit(self.close)

    @property
    def _away(self) -> bool:
        """Switched off, or inherited by a forked child, whose training is no part of the run."""
        return not self.enabled or self._recorder.inherited

    def _leave(self) -> None:
        """In a forked child: nothing of it is left in the child's forward passes, and a word is said once."""
        if self.enabled and self._recorder.inherited:
            self._observer.passes.disarm()
            self._recorder.say_inherited()

    # What the user's loop calls.

    @property
    def step(self) -> int:
        """Optimizer steps taken so far."""
        return self._observer.loop.step if self.enabled else 0

    def observe(self, batch: Batch, loss: Tensor | float | None = None) -> None:
        """Look at the step about to be taken: after backward, before the optimizer's step.

        `batch` is what the loss was computed on, `loss` the number that backward was called on (before a GradScaler's
        scaling); with `accumulate=k` every k calls are one step and their losses add up.
        """
        if self._away or self._closed:
            self._leave()
            return
        with self.clock.bucket("observe"):
            try:
                self._observer.observe(batch, loss)
            except Exception as error:
                self._observer.trouble(error)

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """The loader's batches; the time it takes to get each is billed to the data bucket."""
        return self.clock.timed(loader, "data") if self.enabled else iter(loader)

    @contextmanager
    def evaluating(self) -> Iterator[Callable[..., None]]:
        """Off the training clock. Yields a function that logs the metrics it is given by name."""
        if self._away:
            yield lambda **metrics: None
            return
        self._observer.settle()
        with self.clock.bucket("evaluate"), self._observer.passes.paused():
            yield self._evaluated

    def _evaluated(self, **metrics: float | Tensor) -> None:
        values = self._numbers(metrics)
        self._recorder.write(Metrics(self.step, self.clock.training, values, "evaluation"))
        if self._ending.evaluated(values, self.step, self.clock.training):
            self._observer.event("target_hit", target=str(self._ending.target))
        self._recorder.progress(self.step)

    def log(self, **values: float | Tensor) -> None:
        """The user's own scalars, on the axis of the run."""
        if not self._away:
            self._recorder.write(Metrics(self.step, self.clock.training, self._numbers(values), "user"))

    def _numbers(self, values: Mapping[str, float | Tensor]) -> dict[str, float]:
        """The values as numbers; what is none is left out with an event."""
        numbers = {}
        for name, value in values.items():
            try:
                numbers[name] = float(value)
            except (TypeError, ValueError, RuntimeError) as error:
                self._observer.trouble(ValueError(f"expected one number as '{name}', got {type(value)}: {error}"))
        return numbers

    def event(self, name: str, **detail: Any) -> None:
        """Something of the user's own that happened once, with whatever numbers and texts belong to it."""
        if not self._away:
            self._observer.event(name, **detail)

    def read(self, instrument: str | Instrument, batch: Batch | None = None, *, ranks: Any = None) -> Reading:
        """One reading now, whatever the cadence and the budget, on this batch or on the last one observed.

        Between backward and the optimizer's step the gradient is the one that stands in `.grad`. Without a batch,
        curvature is read on the held ones and an instrument of the panel goes on from its memory; with one, everything
        is read on it, from no memory. What cannot be read comes back with status and reason. With `ranks`, a process
        group whose members all make this call at this step, curvature is that of the batches of all of them.
        """
        if not self.enabled:
            return Reading(str(instrument), 0, 0.0, "skipped", reason="the cockpit is switched off")
        with self.clock.bucket("observe"):
            return read_now(self._observer, self._readout, instrument, batch, ranks)

    def prices(self, batch: Batch | None = None) -> Prices:
        """What one reading of each instrument costs, really measured, on this training batch or on the last one.

        Nothing is logged, paid or remembered, and training is not touched: a preview for before the first step, or a
        look in between. ValueError without a batch when none was observed yet. `Prices` says what is in the figures.
        """
        if not self.enabled:
            return NOTHING
        return price_list(self._observer, self._readout, self.clock, batch, self._steps, self._accumulate)

    def plot(self, instrument: str | None = None) -> Any:
        """The panel picture of the run so far, or all that one instrument read, as a Figure; None when switched off."""
        return self._recorder.run().plot(instrument) if self.enabled else None

    @property
    def last(self) -> Mapping[str, Mapping[str, Any]]:
        """Values of each instrument's last reading that was ok: `cockpit.last["gradient/norm"]["norm"]`."""
        return self._recorder.memory.latest if self.enabled else {}

    @property
    def records(self) -> list[Record]:
        """The latest records of the run, oldest first (the log on disk has all)."""
        return self._recorder.memory.records if self.enabled else []

    @property
    def outcome(self) -> Outcome | None:
        """How the run ended, once it has."""
        return self._ending.outcome if self.enabled else None

    @property
    def target_hit(self) -> bool:
        """Whether an evaluation has reached the target."""
        return self.enabled and self._ending.hit_step is not None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs so that the run goes on as if it had not stopped."""
        if not self.enabled:
            return {}
        self._observer.settle()
        return {
            **self._observer.loop.state_dict(),
            "clock": self.clock.state_dict(),
            "readout": self._readout.state_dict(),
            "ending": self._ending.state_dict(),
            "held": self._observer.probes.held.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint; records of the resumed log from its step on no longer count."""
        if not self.enabled or not state:
            return
        self._observer.loop.load_state_dict(state)
        self._recorder.from_step = self.step
        self.clock.load_state_dict(state["clock"])
        self._readout.load_state_dict(state["readout"])
        self._ending.load_state_dict(state["ending"])
        self._observer.probes.held.load_state_dict(state["held"], self._device)

    def close(self, status: Status | None = None, reason: str = "") -> Outcome | None:
        """End the run: the outcome is written, the summary printed, hooks and sinks are closed. Safe to call twice."""
        if self._away or self._closed:
            return self.outcome
        self._closed = True
        self._at_exit.cancel()
        try:
            self._observer.close()
        finally:
            given, read = self._observer.last_loss, self.last.get("batch/loss", {}).get("loss")
            self._ending.last_loss = read if given is None else given
            self.clock.stop()  # so that the buckets of the outcome are of one moment
            outcome = self._ending.close(self.clock, self.step, status, reason, skips=self._readout.skips)
            self._recorder.close(outcome)
            self.clock.stop()
        return outcome

    def write_text(self, name: str, text: str) -> None:
        """Put a small text file into the run folder, if there is one."""
        if not self._away and self._recorder.folder is not None:
            self._recorder.folder.write_text(name, text)

    def save_checkpoint(self, name: str, **parts: Any) -> None:
        """Save the parts (state dictionaries by name) and the cockpit's own state into the run's `checkpoints/`."""
        if not self._away and self._recorder.folder is not None:
            torch.save({**parts, "cockpit": self.state_dict()}, self._recorder.folder.checkpoints / name)

    def __enter__(self) -> "Cockpit":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(*status_of(error))

    def __del__(self) -> None:
        """Dropped without close(): the log still gets its outcome."""
        if getattr(self, "_closed", True) is False:
            with suppress(Exception):
                self.close()


def off() -> bool:
    """Whether the environment says COCKPIT=off."""
    return os.environ.get("COCKPIT", "").lower() in ("off", "0", "false")


def batches(*given: Batch) -> list[Batch]:
    """The batches that curvature is read on: `Cockpit(..., probe=batches((x1, y1), (x2, y2)))`.

    Each is used whole; several are one loss, weighted by what their losses average over (examples, tokens that count).
    """
    return list(given)
