"""Where the records of a run go: its folder, its sinks, its status file."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cockpit_bench.clock import Clock
from cockpit_bench.environment import environment
from cockpit_bench.ranks import this_process
from cockpit_bench.runlog import Event, LogWriter, Outcome, Record, Run, RunFolder, new_header, read_run
from cockpit_bench.sinks import CallbackSink, ConsoleSink, Fanout, JsonlSink, MemorySink, Sink, TensorBoardSink
from workloads.target import Target

KEPT_IN_MEMORY = 10_000
INHERITED = (
    "this process was forked from the one that made the Cockpit, whose run it is: nothing is read or logged here. To "
    "observe training in a child, make the Cockpit there."
)


class Recorder:
    """Opens what a run writes to, hands every record to every sink off the training clock, and closes it all.

    A resumed run says from which step on its earlier records no longer count; that is known at its first record, after
    a checkpoint may have been loaded, so what depends on it is opened there.

    Of several processes that train together only rank 0 writes: the others keep their records in memory, and neither
    folder, console nor the user's own sinks hear of them. A forked child has the files of its parent: it writes nothing
    and closes nothing, since the threads that some sinks wait for do not live on in it.
    """

    def __init__(
        self,
        clock: Clock,
        logdir: str | os.PathLike[str] | None,
        resume: bool,
        sinks: Sequence[Sink | Callable[..., None]] | None,
        target: Target | None,
        steps: int | None,
        *,
        interactive: bool,
        about: Mapping[str, Any],
    ) -> None:
        process = this_process()
        if not process.writes:
            logdir, sinks = None, []
        about = {**about, "process": asdict(process)}
        self.memory = MemorySink(KEPT_IN_MEMORY)
        self._clock, self._about, self._begun, self._closed = clock, about, False, False
        self._process, self._told = os.getpid(), False
        self.from_step = 0  # of the checkpoint that a resumed run goes on from
        self.folder = RunFolder.create(logdir, resume=resume) if logdir is not None else None
        self._resumed = self.folder is not None and self.folder.log_path.exists()
        own: list[Sink] = [self.memory]
        if sinks is None:
            place = None if self.folder is None else str(self.folder.path)
            own.append(ConsoleSink(target=target, steps=steps, interactive=interactive, folder=place))
        own += [s if isinstance(s, Sink) else CallbackSink(s) for s in sinks or ()]
        if self.folder is not None:  # last: a folder with a log in it is a run, and there is none if this fails before
            self.folder.write_environment(environment())
            self.folder.write_status({"state": "running", "pid": os.getpid(), "step": 0})
            header = new_header(self.folder.path.resolve().name, **about)
            own.insert(0, JsonlSink(LogWriter(self.folder.log_path, header)))
        self._wants_tensorboard = sinks is None and self.folder is not None
        self._fanout = Fanout(own)

    @property
    def inherited(self) -> bool:
        """Whether this process was forked from the one that opened the run, whose it remains."""
        return os.getpid() != self._process

    def say_inherited(self) -> None:
        """Once, on stderr: a warning could be turned into an exception by the user's filters."""
        if not self._told:
            self._told = True
            print(f"cockpit: {INHERITED}", file=sys.stderr)

    def write(self, record: Record) -> None:
        """To every sink, in the log bucket. Never raises: a sink that fails is switched off with a message.

        What comes after the outcome is not part of the run.
        """
        if self._closed or self.inherited:
            return
        with self._clock.bucket("log"):
            if not self._begun:
                self._begin(record)
            self._fanout.write(record)

    def _begin(self, record: Record) -> None:
        self._begun = True
        if self._wants_tensorboard and self.folder is not None:
            purge = self.from_step if self._resumed else None
            path, about = self.folder.path, self._about
            self._fanout.add(lambda: TensorBoardSink(path, purge_step=purge, about=about))
        if self._resumed:
            self._fanout.write(Event(self.from_step, record.seconds, "superseded", {"from_step": self.from_step}))

    def run(self) -> Run:
        """The run so far: from the log where there is one, else from what is kept in memory."""
        if self.folder is not None:
            return read_run(self.folder.path)
        header = new_header("in memory", **self._about)
        return Run(Path("in memory"), header, self.memory.records, 0, {}, {}, {})

    def progress(self, step: int) -> None:
        """The status file says how far the run is."""
        if self._closed or self.inherited:
            return
        with self._clock.bucket("log"):
            self._status({"state": "running", "pid": os.getpid(), "step": step, "seconds": self._clock.training})

    def close(self, outcome: Outcome) -> None:
        """Write the outcome, close the sinks, and leave the final status."""
        self.write(outcome)
        self._closed = True
        self._fanout.close()
        state = {"state": "finished", "outcome": outcome.status, "step": outcome.step, "seconds": outcome.seconds}
        self._status({**state, "reason": outcome.reason})

    def _status(self, status: dict[str, Any]) -> None:
        if self.folder is None:
            return
        try:
            self.folder.write_status(status)
        except OSError as error:
            print(f"cockpit: status.json could not be written ({error}); the log is not affected.", file=sys.stderr)
