"""Makes the probes of a run: what all of them have in common, and what one leaves for the next."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from cockpit_bench.loop_state import LoopState
from instruments.held import HeldBatches
from instruments.layout import Layout, remembered_layout
from instruments.loss_scale import loss_scale
from instruments.needs import Need
from instruments.objective import Batch, Objective
from instruments.probe import Probe
from instruments.probe_settings import ProbeSettings
from instruments.running import unwrapped
from instruments.samples.watched import Watched

REPLACED = (
    "the parameters move, but the optimizer that the cockpit was given has stopped stepping: another one has taken its "
    "place, and what this one holds is of the past. Give the new one to a new Cockpit (logdir of its own, or "
    "resume=True and load_state_dict); steps are counted at observe() meanwhile, and what reads no optimizer goes on."
)


class Probes:
    """What is trained, and how it is to be read, for as long as the run lasts; where the loop stands is passed.

    `held` are the batches that curvature is read on. `graphs` is what is remembered of the graphs of the model, so that
    what was checked once need not be checked again; forgotten, it is found anew when it is needed.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        optimizers: Sequence[Any],
        *,
        held: HeldBatches,
        settings: ProbeSettings,
        scaler: Any,
    ) -> None:
        self.module, self.optimizers, self.held, self.settings = unwrapped(model), optimizers, held, settings
        self.graphs: dict[Any, Any] = {}
        self._model, self._objective, self._scaler = model, objective, scaler
        self._plans: dict[Any, Any] = {"graphs": self.graphs}

    @property
    def loss_scale(self) -> float:
        """By how much `.grad` is too large at this moment."""
        return loss_scale(self._scaler, self.optimizers)

    def layout(self) -> Layout:
        """The parameters that a probe of this moment would read."""
        return remembered_layout(self._plans, self.module, self.settings.patterns, self.optimizers)

    def make(
        self,
        loop: LoopState,
        batches: Sequence[Batch],
        loss: Tensor | float | None,
        *,
        held: HeldBatches | None = None,
        guarded: bool = True,
        expected: frozenset[Need] = frozenset(),
        watched: Watched | None = None,
    ) -> Probe:
        """The present state of training, to be used in a `with`.

        Not guarded from the start are only instruments of this library.
        """
        held = self.held if held is None else held
        probe = Probe(
            self._model,
            self._objective,
            self.optimizers,
            batches,
            step=loop.step,
            loss=loss,
            held=held if held.batches else None,
            loss_scale=self.loss_scale,
            gradient_factor=loop.gradient_factor,
            settings=self.settings,
            guarded=guarded,
            expected=expected,
            plans=self._plans,
            watched=watched,
        )
        probe.stale = REPLACED if loop.replaced else ""
        return probe

    def on_demand(self, loop: LoopState, batch: Batch | None) -> Probe | None:
        """The probe of a reading on demand: of this batch or of the last one observed; None when there is neither."""
        if batch is not None:
            given = HeldBatches([batch])
            given.label = "given"
            return self.make(loop, [batch], None, held=given)
        if not loop.last and not self.held.batches:
            return None
        return self.make(loop, loop.last, loop.loss if loop.observed else None)
