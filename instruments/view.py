"""What one instrument sees of one step: what it declared in `needs`, billed and labelled.

Shapes: D = trainable scalars.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, optim

from instruments.activations import Activations
from instruments.diagonals.backpack import Extension
from instruments.diagonals.draws import Draws
from instruments.example_gradients import Look, Seen, of_probe
from instruments.layout import Layout, norms_of, norms_of_difference
from instruments.line import StepExamples
from instruments.meter import Counted, Meter
from instruments.needs import RUNS_MODEL, SAMPLES
from instruments.needs import Need as Need
from instruments.objective import Batch
from instruments.operators.operator import Operator
from instruments.operators.preconditioned import PreconditionedOperator
from instruments.parameter_state import ParameterState, parameter_states
from instruments.preconditioners import Preconditioner, read_preconditioner, sharpness_edge
from instruments.refusal import Refusal
from instruments.running import Found, processes
from instruments.samples.moments import SampleMoments
from instruments.samples.problem import Want
from instruments.step_effect import StepEffect

if TYPE_CHECKING:
    from instruments.diagonals.of_probe import Diagonals
    from instruments.probe import Probe


class View:
    """What one instrument sees of one step: what it declared, billed and labelled. Undeclared needs raise."""

    def __init__(self, probe: "Probe", needs: frozenset[Need]) -> None:
        self._probe, self._needs = probe, needs
        self.meter = Meter(provenance=self._provenance())

    def _provenance(self) -> dict[str, Any]:
        """What a reading is about; what cannot be known says so."""
        probe = self._probe
        facts: dict[str, Any] = {"batch": "step", "examples": probe.examples or "unknown"}
        if self._needs & {"gradient", "preconditioner", "states"}:
            facts["scaled"] = "no" if probe.loss_scale == 1.0 else f"unscaled from {probe.loss_scale:g}"
            facts["clipped"] = "unknown"
        if self._needs & RUNS_MODEL or ("loss" in self._needs and not probe.loss_given):
            facts["mode"] = probe.mode
        if self._needs != {"groups"}:
            facts["precision"] = probe.precision
        if probe.settings.patterns is not None:
            facts["parameters"] = f"those named {', '.join(probe.settings.patterns)}"
        if processes() > 1:
            facts["scope"] = f"this one of {processes()} processes"
        return facts

    @property
    def step(self) -> int:
        """Optimizer steps taken before the one that this reading belongs to."""
        return self._probe.step

    @property
    def examples(self) -> int:
        """Examples of the step's batches, 0 where they cannot be counted."""
        return self._probe.examples

    @property
    def batches(self) -> Sequence[Batch]:
        """The batches of the step as the user gave them, one unless gradients are accumulated."""
        self._declared("batch")
        return self._probe.batches

    @property
    def optimizers(self) -> tuple[optim.Optimizer, ...]:
        self._declared("groups")
        return self._probe.optimizers

    @property
    def loss(self) -> Tensor:
        """Training loss of the step, unscaled."""
        self._declared("loss")
        return self._probe.loss(self.meter)

    @property
    def loss_given(self) -> bool:
        """Whether the user passed the loss to observe; otherwise asking for it costs a forward."""
        return self._probe.loss_given

    @property
    def losses_N(self) -> Tensor:
        """Loss of each example of the step, (N,); their mean is the loss."""
        self._declared("example_losses")
        losses_N = self._probe.example_losses(self.meter)
        self.meter.provenance["examples"] = len(losses_N)
        return losses_N

    @property
    def gradient_norm(self) -> Tensor:
        """Norm of what stands in `.grad`, unscaled."""
        self._declared("gradient")
        return self._probe.gradient_norm

    @property
    def grads(self) -> tuple[Tensor | None, ...]:
        """What stands in `.grad` of each trained parameter, unscaled; None where there is none."""
        self._declared("gradient")
        return self._probe.unscaled_grads

    @property
    def used_grads(self) -> tuple[Tensor | None, ...]:
        """The gradients that the optimizer's step used, unscaled: what stands in `.grad` after it, when a GradScaler
        has divided it in place, by `unscale_` or within the step."""
        self._declared("gradient")
        self._declared("change")
        return self._probe.grads

    @property
    def states(self) -> list[ParameterState]:
        """What the optimizers keep of each trained parameter, with its gradient and its group."""
        self._declared("states")
        return parameter_states(self._probe.optimizers, self._probe.layout, self._probe.unscaled_grads)

    @property
    def activations(self) -> Activations:
        """Outputs of the layers on the step's batches, by name; `instruments.activations.OUTPUT` is the model's own."""
        self._declared("activations")
        return self._probe.activations(self.meter)

    def forward(self, watch: Callable[[], AbstractContextManager[Found]]) -> Found:
        """Run model and loss on the step's batches once more, no gradient asked, inside `watch()`; gives what that was
        entered as. Where a forward has to be repeated, it is made anew: what it sees must begin with it."""
        self._declared("forward")
        return self._probe.forward(watch, self.meter)

    @property
    def moments(self) -> SampleMoments:
        """Per-example gradient statistics of the step's batch: norms and mean, and what else is declared."""
        if not self._needs & SAMPLES:
            self._declared("samples")
        wants = cast(frozenset[Want], self._needs & SAMPLES - {"samples"})
        moments = self._probe.samples.moments(self.meter, wants)
        self.meter.provenance["examples"] = moments.examples
        return moments

    @property
    def sample_pass(self) -> float:
        """What the pass over the model of `moments` costs, in g: none where that of the training itself was watched."""
        return 0.0 if self._probe.samples.seen_in_training else 1.0

    def example_gradients(self, count: int, look: Look[Seen]) -> list[Seen]:
        """What `look` says of the whole gradients of at most `count` of the step's examples, one after the other."""
        self._declared("example_gradients")
        seen, price = of_probe(self._probe, count, look)
        self.meter.gradients += price
        return seen

    @property
    def hessian(self) -> Operator:
        """Hessian of the training loss on the held batches."""
        self._declared("hessian")
        return Counted(self._probe.curvatures.hessian(self.meter), self.meter)

    @property
    def step_hessian(self) -> Operator:
        """Hessian of the training loss on the step's own batches, under its own masks."""
        self._declared("step_hessian")
        return Counted(self._probe.curvatures.step_hessian(self.meter), self.meter)

    @property
    def step_gradient_D(self) -> Tensor:
        """Gradient of the loss on the step's own batches, recomputed, shape (D,)."""
        self._declared("step_hessian")
        return self._probe.curvatures.step_hessian(self.meter).gradient_D

    @property
    def gauss_newton(self) -> Operator:
        """Gauss-Newton matrix of the training loss on the held batches: positive semidefinite for convex losses."""
        self._declared("gauss_newton")
        return Counted(self._probe.curvatures.gauss_newton(self.meter), self.meter)

    @property
    def fisher(self) -> Operator:
        """Empirical Fisher on the held batches: mean of g_i g_i', uncentred."""
        self._declared("fisher")
        return Counted(self._probe.curvatures.fisher(self.meter), self.meter)

    @property
    def drawn_fisher(self) -> Operator:
        """Fisher on the held batches with targets drawn from the model's own predictions, anew at every step."""
        self._declared("drawn_fisher")
        return Counted(self._probe.curvatures.fisher(self.meter, seed=self._probe.step), self.meter)

    def drawn_diagonal(self, draws: int) -> Draws:
        """Diagonal of the Fisher on the held batches, with targets drawn from the model's own predictions `draws`
        times: unbiased for the diagonal of the Gauss-Newton matrix."""
        self._declared("drawn_diagonal")
        return self._probe.diagonals.drawn(draws, self.meter)

    def backpack_diagonal(self, extension: Extension, draws: int = 1) -> Draws:
        """Diagonal of the Gauss-Newton matrix or the Hessian on the held batches, for models that BackPACK can read."""
        self._declared("backpack_diagonal")
        return self._probe.diagonals.backpack(extension, draws, self.meter)

    @property
    def diagonals(self) -> "Diagonals":
        """What a diagonal would cost, and whether targets can be drawn for the loss; nothing is computed."""
        return self._probe.diagonals

    @property
    def gradient_D(self) -> Tensor:
        """Gradient of the loss on the held batches, shape (D,): free where the Hessian's graph is kept."""
        self._declared("hessian")
        return self._probe.curvatures.hessian(self.meter).gradient_D

    @property
    def preconditioner(self) -> Preconditioner:
        """D and c of the optimizers at this step."""
        self._declared("preconditioner")
        return self._probe.preconditioner

    @property
    def sharpness_edge(self) -> float:
        """The sharpness at which rho = 1, where one number says it; NaN where coordinates differ or D is not known."""
        self._declared("preconditioner")
        try:
            return sharpness_edge(self._probe.preconditioner, self._probe.gradient_factor)
        except Refusal:
            return math.nan

    @property
    def preconditioned(self) -> Operator:
        """1/2 D^1/2 (k H + diag c) D^1/2, whose largest eigenvalue is rho.

        k is 1, unless accumulated losses are added instead of averaged: then the loss that is trained is k times the
        loss that was given.
        """
        factor = self._probe.gradient_factor
        if factor != 1.0:
            self.meter.provenance["gradient_factor"] = factor
        return self._preconditioned(self.preconditioner, factor)

    def clipped_preconditioned(self, kept: float) -> Operator:
        """The same where clipping leaves `kept` of the gradient: 1/2 D^1/2 (kept k H + diag c) D^1/2, D read from what
        is left."""
        self._declared("gradient")
        self._declared("preconditioner")
        probe = self._probe
        grads = [None if g is None else g * kept for g in probe.unscaled_grads]
        p = read_preconditioner(probe.optimizers, probe.layout, grads)
        return self._preconditioned(p, kept * probe.gradient_factor)

    def _preconditioned(self, p: Preconditioner, factor: float) -> Operator:
        self._declared("hessian")
        hessian = Counted(self._probe.curvatures.hessian(self.meter), self.meter)
        return PreconditionedOperator(hessian, p.scale_D * (factor / 2), p.decay_D / factor, p.basis)

    @property
    def layout(self) -> Layout:
        return self._probe.layout

    @property
    def parameters(self) -> list[Tensor]:
        """The trained parameters themselves, in the order of the model, to be read only."""
        self._declared("parameters")
        return [p.detach() for p in self._probe.layout.params]

    @property
    def parameter_norms(self) -> Tensor:
        """Norm of each trained parameter tensor, in the order of the model, by one fused pass."""
        self._declared("parameters")
        return norms_of(self._probe.layout.params)

    @property
    def changes(self) -> list[Tensor]:
        """What the step added to each parameter; only after the optimizer's step."""
        self._declared("change")
        return self._probe.change()

    @property
    def update_norms(self) -> Tensor:
        """Norm of the change of each parameter tensor by this step; only after the optimizer's step."""
        self._declared("change")
        return norms_of_difference(self._probe.layout.params, self._probe.before)

    @property
    def norms_before(self) -> Tensor:
        """Norm of each parameter tensor as the step found it; only after the optimizer's step."""
        self._declared("change")
        return norms_of(self._probe.before)

    @property
    def effect(self) -> StepEffect:
        """What the step did to the loss of its own batch; only after the optimizer's step."""
        self._declared("update")
        return self._probe.effect(self.meter)

    def loss_at(self, scale: float) -> Tensor:
        """Loss of the step's batches at the old parameters plus `scale` times the step that was taken."""
        self._declared("line")
        return self._probe.loss_at(scale, self.meter)

    @property
    def step_examples(self) -> StepExamples:
        """Loss at both ends of the step and its slope along it, by example; only after the optimizer's step."""
        self._declared("step_examples")
        return self._probe.step_examples(self.meter)

    def _declared(self, need: Need) -> None:
        if need not in self._needs:
            raise AssertionError(f"the instrument asked for '{need}', which its `needs` do not declare")
