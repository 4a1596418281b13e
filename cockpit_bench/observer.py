"""One optimizer step, from observe() to the hook that closes it: what is read when, and what is not a step."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, optim

from cockpit_bench.clip_watch import GradientMark
from cockpit_bench.clock import Bucket, Clock
from cockpit_bench.loop_state import LoopState
from cockpit_bench.probes import REPLACED, Probes
from cockpit_bench.readout import Readout, Station
from cockpit_bench.recorder import Recorder
from cockpit_bench.runlog import Event
from cockpit_bench.step_watch import StepWatch, running_steps
from instruments.gradient_match import compare_gradient
from instruments.held import is_empty
from instruments.loss_scale import skipped_inside
from instruments.needs import AFTER_STEP, CURVATURES, RUNS_MODEL, WATCHED
from instruments.objective import Batch
from instruments.probe import Probe
from instruments.refusal import Refusal
from instruments.running import settle_heap
from instruments.samples.watched import PassWatch, Watched

COMPARISONS = 2  # of the gradient that is trained with that of the loss that was given, while they are equal


class Observer:
    """Reads what is due before the step and, when its hook fires, what needs the parameters after it.

    A step is one optimizer step, closed when the last optimizer's step hook fires. A step that a GradScaler or the user
    skipped is an event and not a step. Within a closure (LBFGS) only the first evaluation of a step is observed.
    """

    def __init__(
        self,
        probes: Probes,
        readout: Readout,
        recorder: Recorder,
        *,
        clock: Clock,
        accumulate: int,
        strict: bool,
    ) -> None:
        self.probes, self._readout, self._recorder = probes, readout, recorder
        self._clock, self._accumulate, self._strict = clock, accumulate, strict
        self.loop = LoopState()
        self.last_loss: Tensor | float | None = None
        self._update: Bucket | None = None
        self._copies: list[Tensor] | None = None
        self._first: Tensor | None = None
        self._collects = any(s.instrument.needs & CURVATURES for s in readout.stations)
        outputs = [out for s in readout.stations for out in s.instrument.outputs.values()]
        self._per_layer = any(out.kind == "per-layer" for out in outputs)
        self._watch = StepWatch(probes.optimizers, self)
        self.passes = PassWatch(probes.module, probes.graphs, self._within_training)
        settle_heap()

    def observe(self, batch: Batch, loss: Tensor | float | None) -> None:
        """One micro-batch, after its backward."""
        loop = self.loop
        if loop.stepping is not None and not running_steps(loop.stepping):
            self._aborted_step()
        if loop.observed and loop.stepping is not None:
            return  # a closure evaluated again within one step: the first evaluation counted
        if loop.observed:
            self._previous_step_over()
        loop.take(batch, self._one_number(loss))
        if len(loop.batches) < self._accumulate:
            return
        loop.observed, loop.version = True, self._version()
        self.last_loss = loop.loss
        if not loop.begun:
            self._first_observed()
        if self._collects:
            self.probes.held.offer(loop.batches)
        seen = self.passes.take(loss)
        due = self._readout.due(loop.step)
        if due:
            self._readout.budget.overhead = self._clock.bucket("observe").seconds  # what is billed to no instrument
            payable = self._readout.payable(due, loop.step)
            if payable:
                self._read_before_step(payable, seen)

    def _within_training(self) -> AbstractContextManager[Any]:
        """Round what is done within the user's pass and after every step. On an accelerator the host would have to wait
        for the device to bill it, which would cost more than what is billed."""
        return nullcontext() if self._clock.waits else self._clock.bucket("observe")

    def _watch_next_pass(self) -> None:
        """Where single examples, or what the step does, are to be read at the next step, its own forward and backward
        pass is watched: of a loss that was seen to be the one that is trained."""
        loop, mode = self.loop, self.probes.settings.mode
        can = loop.matched and self._accumulate == 1 and mode == "train" and self._watch.hooked
        if can and any(s.instrument.needs & WATCHED for s in self._readout.affordable(self._readout.due(loop.step))):
            self.passes.arm(self.probes.layout())

    def _first_observed(self) -> None:
        """Steps that were taken before anything was observed: observe() may stand on the wrong side of them."""
        loop = self.loop
        if loop.begun_at != loop.step:
            reason = (
                f"{loop.step - loop.begun_at} optimizer step(s) were taken before the first observe(); it belongs "
                "after backward() and before the optimizer's step(), else every reading pairs the gradient with "
                "parameters that have moved on. If you began to observe late on purpose, this is of no concern."
            )
            self.event("observed_late", reason=reason)
        loop.begun = True

    def _read_before_step(self, stations: list[Station], seen: Watched | None) -> None:
        loop = self.loop
        if is_empty(loop.batches[0]):
            raise Refusal("expected a batch with at least one example, got an empty one; nothing was read at this step")
        needs = frozenset().union(*(s.instrument.needs for s in stations))
        trusted = all(s.built_in for s in stations)  # these take the guard when they run the model
        probe = self.probes.make(loop, loop.batches, loop.loss, guarded=not trusted, expected=needs, watched=seen)
        with probe:
            if self._per_layer:
                self._name_layers(probe)
            if needs & RUNS_MODEL and loop.compared < (COMPARISONS if loop.matched else 1):
                self._compare(probe)
                probe.gradient_factor = loop.gradient_factor
            for station in stations:
                if not station.instrument.needs & AFTER_STEP:
                    self._readout.take(station, probe)
            if "gradient" in needs and any(g is not None for g in probe.grads):
                loop.mark = GradientMark.of(probe.layout.params, probe.gradient_norm, probe.loss_scale)
            probe.samples.keep()
        later = [s for s in stations if s.instrument.needs & AFTER_STEP]
        if later:
            self._copies = probe.remember(self._copies)
            loop.pending = (probe, later)

    def step_begins(self, optimizer: optim.Optimizer) -> None:
        """Hook: an optimizer's step starts."""
        before = self.loop.stepping
        if before is optimizer or (before is not None and not running_steps(before)):
            self._aborted_step()
        self.loop.stepping = optimizer
        if self.loop.mark is not None:
            with self._clock.bucket("observe"):
                self._look_for_clip()
        if self._update is None:
            self._update = self._clock.bucket("update")
            self._update.__enter__()

    def step_ends(self, optimizer: optim.Optimizer) -> None:
        """Hook: an optimizer's step is done; the last of them closes the step."""
        self._end_update()
        loop = self.loop
        loop.stepping, loop.hooked, loop.replaced, loop.moved_without = None, True, False, 0
        if skipped_inside(optimizer):
            self._skipped_step()
            return
        loop.stepped.add(id(optimizer))
        if len(loop.stepped) < len(self.probes.optimizers):
            return
        if loop.observed:
            self.close_step()
        else:
            loop.next_step()  # a step that nobody observed is a step all the same
        with self._within_training():
            try:
                self._watch_next_pass()
            except Exception as error:
                self.trouble(error)

    def _end_update(self) -> None:
        if self._update is not None:
            self._update.__exit__(None, None, None)
            self._update = None

    def _aborted_step(self) -> None:
        """The step that began last has raised: it is not taken, and what was read before it has no other end."""
        self._end_update()
        self.loop.stepping = None
        if self.loop.observed:
            self._skipped_step()

    def close_step(self) -> None:
        """Read what needs the parameters after the step, and count it."""
        if self.loop.pending is not None:
            with self._clock.bucket("observe"):
                self._read_after_step(*self.loop.pending)
        self.loop.next_step()

    def _read_after_step(self, probe: Probe, stations: Iterable[Station]) -> None:
        try:
            with probe:
                for station in stations:
                    self._readout.take(station, probe)
        except Exception as error:
            self.trouble(error)
        finally:
            probe.forget()

    def settle(self) -> None:
        """An optimizer without hooks has stepped by now: the user evaluates or ends the run."""
        if self.loop.observed and (self.loop.replaced or not self._watch.hooked):
            self.close_step()

    def close(self) -> None:
        """Take the hooks off the optimizers."""
        self.settle()
        self._watch.close()
        self.passes.disarm()

    def trouble(self, error: Exception) -> None:
        """Something broke in the cockpit itself: logged once a kind, training goes on."""
        if self._strict:
            raise error
        if self.loop.new_trouble(error):
            self.event("observe_failed", reason=f"{type(error).__name__}: {error}")

    def event(self, name: str, **detail: Any) -> None:
        self._recorder.write(Event(self.loop.step, self._clock.training, name, detail))

    def _previous_step_over(self) -> None:
        """The step observed last was not closed by a hook: there are none, or not every optimizer took it."""
        loop = self.loop
        past = self._watch.hooked and not loop.stepped and self._version() != loop.version
        if past and not loop.hooked:
            self._watch.close()  # the optimizer steps past its hooks: from here on its steps are noticed at observe
        elif past and not self._replaced():
            past = False
        if past or loop.stepped or not self._watch.hooked:
            self.close_step()
        else:
            self._skipped_step()

    def _replaced(self) -> bool:
        """Whether the parameters moved by the step of another optimizer. Once it may be weights that were clamped after
        a skipped step, or put back; twice in a row it is."""
        loop = self.loop
        loop.moved_without += 1
        if loop.moved_without < 2:
            return False
        if not loop.replaced:
            loop.replaced = True
            self.event("optimizer_replaced", reason=REPLACED)
        if loop.pending is not None:
            loop.pending[0].stale = REPLACED
        return True

    def _skipped_step(self) -> None:
        if not self.loop.skipping:
            self.event("skipped_step", loss_scale=self.probes.loss_scale)
        self.loop.abandon()

    def _name_layers(self, probe: Probe) -> None:
        """Once a run, and again if they change: the order in which per-layer outputs are logged."""
        names = probe.layout.names
        if names != self.loop.layers:
            self.loop.layers = names
            self.event("layers", names=list(names), sizes=[p.numel() for p in probe.layout.params])

    def _compare(self, probe: Probe) -> None:
        """Is the loss that the cockpit was given the loss that is trained? Asked again of one that is: gradients that
        are never zeroed are right at the first step."""
        loop, again = self.loop, self.loop.compared > 0
        loop.compared += 1
        try:
            match = compare_gradient(probe, self._accumulate, was_equal=again)
        except Exception as error:  # the user's loss function may raise anything
            self.event("gradient_unchecked", reason=f"{type(error).__name__}: {error}")
            return
        if not again:
            loop.gradient_factor = match.factor
        loop.matched = match.verdict == "equal" or (again and match.verdict == "explained")
        if match.verdict == "equal":
            return
        name = "gradient_mismatch" if match.verdict == "unexplained" else "gradient_note"
        self.event(name, reason=match.reason, cosine=match.cosine, ratio=match.ratio)

    def _look_for_clip(self) -> None:
        """Did the user clip between observe and now? Compared once a step, by the first optimizer that steps."""
        mark, self.loop.mark = self.loop.mark, None
        assert mark is not None
        try:
            norms = mark.clipped(self.probes.loss_scale)
        except Refusal:
            return
        except Exception as error:
            self.trouble(error)
            return
        if norms is not None:
            self.event("clip", before=norms[0], after=norms[1])

    def _version(self) -> int:
        """Changes when an optimizer writes to the first trained parameter."""
        first = self._first
        if first is None or not first.requires_grad:  # frozen since: another one is looked for
            self._first = first = next((p for p in self.probes.module.parameters() if p.requires_grad), None)
        return 0 if first is None else first._version

    def _one_number(self, loss: Any) -> Tensor | float | None:
        """The loss, or None with an event when it is not one number."""
        if loss is None or (isinstance(loss, Tensor) and loss.numel() == 1):
            return loss
        if not isinstance(loss, Tensor) and hasattr(loss, "__float__") and getattr(loss, "ndim", 0) == 0:
            return float(loss)
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"an object of {type(loss).__name__}"
        message = f"expected the loss as one number, got {found}; it is recomputed instead"
        self.trouble(ValueError(message))
        return None
