"""The one door to the user's model: one training step seen from inside, each quantity computed at most once, lazily.

An instrument does not see the probe but a `View` of it (`instruments.view`).

Shapes: D = trainable scalars, N = examples of the step.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn, optim

from instruments.activations import Activations, read_activations, run_forward
from instruments.curvatures import Curvatures
from instruments.diagonals.of_probe import Diagonals
from instruments.guard import Saved, scripted, untouched
from instruments.held import HeldBatches
from instruments.layout import remembered_layout, total_norm
from instruments.line import StepExamples, loss_at, step_examples
from instruments.meter import Meter
from instruments.objective import Batch, Objective, Parts, examples_of, losses_by_example, pooled_loss
from instruments.preconditioners import Preconditioner, read_preconditioner
from instruments.probe_settings import ProbeSettings
from instruments.reentrant import refuse_reentrant
from instruments.refusal import Refusal
from instruments.running import Found, running, unwrapped, without_graph
from instruments.samples.of_probe import Samples
from instruments.samples.watched import Watched
from instruments.step_effect import StepEffect, step_effect


class Probe(AbstractContextManager["Probe"]):
    """One step of training: use inside `with probe:`, after backward and before (or after) the optimizer's step.

    `expected` names what the instruments of this step need, so that it is computed in one pass; `plans` is what
    is remembered of the model from step to step: what was checked once and need not be checked again.

    Inside the `with`, `.grad`, buffers, random states and modes are out of reach of what is measured
    (`instruments.guard`); on leaving it graphs are freed and everything is as before.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        optimizers: Sequence[optim.Optimizer],
        batches: Sequence[Batch],
        *,
        step: int = 0,
        held: HeldBatches | None = None,
        loss: Tensor | float | None = None,
        loss_scale: float = 1.0,
        gradient_factor: float = 1.0,
        settings: ProbeSettings | None = None,
        guarded: bool = True,
        expected: frozenset[str] = frozenset(),
        plans: dict[Any, Any] | None = None,
        watched: Watched | None = None,
    ) -> None:
        self.module = unwrapped(model)
        self.objective, self._optimizers, self.batches = objective, tuple(optimizers), tuple(batches)
        self.stale = ""  # why the optimizers are not those that train, if they are not
        self.step, self.held = step, held if held is not None else HeldBatches(batches)
        self.settings = settings or ProbeSettings()
        self.loss_scale, self.gradient_factor = loss_scale, gradient_factor
        self._loss = loss
        self.loss_given = loss is not None
        self.plans = {} if plans is None else plans
        self.layout = remembered_layout(self.plans, self.module, self.settings.patterns, self._optimizers)
        self.grads: tuple[Tensor | None, ...] = tuple(p.grad for p in self.layout.params)
        self._before: list[Tensor] | None = None
        self.curvatures, self.diagonals = Curvatures(self), Diagonals(self)
        self.samples = Samples(self, expected, watched)
        self._stack, self._guarded = ExitStack(), guarded
        self._known: dict[str, Any] = {}
        self._saved: Saved | None = None

    def __enter__(self) -> "Probe":
        with ExitStack() as stack:  # what was entered is left again if the guard raises
            stack.enter_context(torch.autocast(self.layout.device.type, enabled=False))  # linear algebra, too
            if self._guarded and not scripted(self.module):  # whoever needs the guard then is refused alone
                self.guard()
            self._stack.push(stack.pop_all())
        return self

    def guard(self) -> Saved:
        """Nothing runs the model outside the guard; what does not run it need not wait for it."""
        if self._saved is None:
            self._saved = self._stack.enter_context(untouched(self.module))
        return self._saved

    def prepare(self) -> None:
        """Guarded, and in the mode of the settings: what engines look at before they run the model."""
        self.guard()
        if self.settings.mode == "eval":
            self.module.eval()

    def __exit__(self, *exc: object) -> None:
        self.curvatures.release()
        self.samples.release()
        for cached in ("preconditioner", "unscaled_grads"):
            self.__dict__.pop(cached, None)
        self._known.clear()
        self._stack.close()
        self._saved = None

    def shrink(self) -> bool:
        """Read curvature on less, after running out of memory. False when there is nothing left to give up."""
        self.curvatures.release()
        return self.held.shrink()

    @cached_property
    def mode(self) -> str:
        """The mode that a forward of a reading runs in: by the modules' own flags unless the settings say eval."""
        if self.settings.mode == "eval":
            return "eval"
        flags = {m.training for m in self.module.modules()}
        return "train" if flags == {True} else "eval" if flags == {False} else "mixed"

    @cached_property
    def examples(self) -> int:
        """Examples of the step's batches, 0 where they cannot be counted."""
        return sum(map(examples_of, self.batches))

    @cached_property
    def precision(self) -> str:
        """The dtypes of the trained parameters."""
        return ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in self.layout.params}))

    @torch.no_grad()
    def remember(self, into: list[Tensor] | None = None) -> list[Tensor]:
        """Copy the parameters: called before the optimizer's step when a reading of the step itself is due.

        `into` is what an earlier call returned: on a CPU fresh memory costs three times what the copy does.
        """
        params = [p.detach() for p in self.layout.params]
        fits = into is not None and [(t.shape, t.dtype) for t in into] == [(p.shape, p.dtype) for p in params]
        if into is not None and fits and self.layout.device.type == "cpu":
            torch._foreach_copy_(into, params)
            self._before = into
        else:
            self._before = [p.clone() for p in params]
        return self._before

    def forget(self) -> None:
        """Drop what was remembered, the batches included."""
        self._before, self.batches = None, ()
        self.samples.forget()

    @contextmanager
    def running(self, *, held: bool, differentiable: bool, forward: bool = True) -> Iterator[None]:
        """Pinned: the masks of held batches stay the same along the run, those of the step's batch change with it.

        Every forward sees the buffers as they were; `forward=False` is for a backward through a graph that exists.
        """
        saved = self.guard()
        if forward:
            saved.buffers.fresh()
        seed = self.settings.seed if held else self.settings.seed + 1 + self.step
        with running(self.module, saved.random, seed=seed, mode=self.settings.mode, differentiable=differentiable):
            yield

    # The quantities. Each is computed for the first view that asks, and billed to it.

    def loss(self, meter: Meter) -> Tensor:
        """The training loss of the step: the user's own number, or one more forward."""
        if self._loss is not None:
            meter.provenance["loss"] = "given"
            return torch.as_tensor(self._loss).detach()
        meter.provenance["loss"] = "recomputed"
        return pooled_loss(self.objective, self._forward(meter))

    def example_losses(self, meter: Meter) -> Tensor:
        """(N,): the loss of each example, in a unit in which their mean is the loss of the step."""
        return losses_by_example(self._forward(meter))

    def _forward(self, meter: Meter) -> Sequence[Parts]:
        """The loss of the step's batches by one forward under the step's own masks, no gradient."""
        found: Sequence[Parts] = self.once("parts", self.parts_here, meter, 1 / 3)
        return found

    def parts_here(self) -> Sequence[Parts]:
        """The loss of the step's batches by one forward, at the parameters as they are at this moment, no gradient."""

        def forward() -> Sequence[Parts]:
            with self.running(held=False, differentiable=False):
                return [self.objective.parts(self.module, batch).detached() for batch in self.batches]

        return without_graph(self.plans, forward)

    def loss_here(self) -> Tensor:
        """The loss of the step's batches as one, in the same way."""
        return pooled_loss(self.objective, self.parts_here())

    def once(self, name: str, compute: Callable[[], Any], meter: Meter, gradients: float) -> Any:
        """A quantity of this step, computed and billed when it is first asked for."""
        if name not in self._known:
            self._known[name] = compute()
            meter.gradients += gradients
        return self._known[name]

    def activations(self, meter: Meter) -> Activations:
        """What the layers give on the step's batches."""
        found: Activations = self.once("activations", lambda: read_activations(self), meter, 1 / 3)
        return found

    def forward(self, watch: Callable[[], AbstractContextManager[Found]], meter: Meter) -> Found:
        """One forward of the step's batches, and what `watch()` saw of it."""
        meter.gradients += 1 / 3
        return run_forward(self, watch)

    def loss_and_gradient(self, *, weighted: bool = True) -> tuple[Tensor, Tensor, bool]:
        """Loss of the step's batches as one, its gradient of shape (D,), and whether the forward drew random numbers.

        `weighted=False` averages over the micro-batches whatever their size.
        """
        with torch.enable_grad():
            with self.running(held=False, differentiable=False):
                before = self.guard().random.now()
                parts = [self.objective.parts(self.module, batch) for batch in self.batches]
                random = before.moved()
                loss = pooled_loss(self.objective, parts) if weighted else torch.stack([p.loss for p in parts]).mean()
            refuse_reentrant(loss)
            with self.running(held=False, differentiable=False, forward=False):
                grads = torch.autograd.grad(loss, self.layout.params, allow_unused=True)
        return loss.detach(), self.layout.join(grads), random

    @property
    def optimizers(self) -> tuple[optim.Optimizer, ...]:
        """Those that step on the parameters; a Refusal where others do by now."""
        if self.stale:
            raise Refusal(self.stale)
        return self._optimizers

    @cached_property
    def unscaled_grads(self) -> tuple[Tensor | None, ...]:
        """`.grad` of each parameter divided by the loss scale; the tensors themselves where the scale is 1."""
        if self.loss_scale == 1.0:
            return self.grads
        return tuple(None if g is None else g / self.loss_scale for g in self.grads)

    @cached_property
    def gradient_norm(self) -> Tensor:
        """Euclidean norm of all gradients together, one scalar tensor, no synchronisation."""
        return total_norm(self.grads) / self.loss_scale

    @cached_property
    def preconditioner(self) -> Preconditioner:
        return read_preconditioner(self.optimizers, self.layout, self.unscaled_grads)

    @torch.no_grad()
    def change(self) -> list[Tensor]:
        """What the optimizer's step added to each parameter."""
        return list(torch._foreach_sub([p.detach() for p in self.layout.params], self.before))

    def effect(self, meter: Meter) -> StepEffect:
        price = 4 / 3 if self.samples.trained is None else 1 / 3
        found: StepEffect = self.once("effect", lambda: step_effect(self, self._all_before), meter, price)
        return found

    def loss_at(self, scale: float, meter: Meter) -> Tensor:
        """Loss of the step's batches at the old parameters plus `scale` times the step."""
        found: Tensor = self.once(f"loss at {scale!r}", lambda: loss_at(self, self._all_before, scale), meter, 1 / 3)
        return found

    def step_examples(self, meter: Meter) -> StepExamples:
        """The loss at both ends of the step and its slope, by example."""
        kept = self.samples.kept
        price = 7 / 3 if kept is None or not kept.complete(self.layout) else 2 / 3
        found: StepExamples = self.once("step_examples", lambda: step_examples(self, self._all_before), meter, price)
        return found

    @property
    def _all_before(self) -> list[Tensor]:
        """The parameters before the step, where they are all that the step changed."""
        if self.settings.patterns is not None:
            raise Refusal("a step changes all parameters, and its loss with them; read it without parameters=...")
        return self.before

    @property
    def before(self) -> list[Tensor]:
        """The parameters before the step."""
        if self._before is None:
            raise Refusal("the parameters before the step were not kept.")
        return self._before
