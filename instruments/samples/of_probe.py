"""Gradients of the single examples of a step: one pass for all who ask, none where the training's own was watched.

Shapes: N = examples of the step, D = trainable scalars.
"""

import weakref
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from instruments.meter import Meter
from instruments.objective import Undefined
from instruments.samples.kept import KeptFactors
from instruments.samples.moments import SampleMoments, moments_of_step, sample_moments
from instruments.samples.problem import SampleProblem, Want
from instruments.samples.watched import Watched

if TYPE_CHECKING:
    from instruments.probe import Probe


class Samples:
    """The moments are computed for the first view that asks, billed to it, and shared until the probe is closed.

    What readings after the step can use of a pass before it stays longer, until `forget`: `kept`, the factors of the
    gradients, and `trained`, loss and gradient of the step, proved to be its batch's. `seen_in_training` says whether
    the pass was that of the training itself.
    """

    def __init__(self, probe: "Probe", expected: frozenset[str], watched: Watched | None) -> None:
        self._probe: Probe = weakref.proxy(probe)
        self._expected: frozenset[Any] = expected & frozenset(get_args(Want))
        self._keeps_factors = "step_examples" in expected and len(probe.batches) == 1
        self._keeps_gradient = "update" in expected
        self._watched, self.seen_in_training = watched, False
        self.kept: KeptFactors | None = None
        self.trained: tuple[Tensor, Tensor] | None = None
        self._moments: SampleMoments | None = None
        self._wants: frozenset[Want] = frozenset()

    def release(self) -> None:
        """Free what only readings before the step use."""
        self._moments = self._watched = None

    def forget(self) -> None:
        """Drop what stayed for readings after the step, too."""
        self.release()
        self.kept = self.trained = None

    def moments(self, meter: Meter, wants: frozenset[Want] = frozenset()) -> SampleMoments:
        """Per-example statistics of the step's batches: one pass for all that is expected of this step, none where the
        training's own was watched."""
        if self._moments is None or not wants <= self._wants:
            self._wants |= wants | self._expected
            self.kept = KeptFactors.of(self._probe.layout) if self._keeps_factors else None
            problem = self._problem(self._wants, kept=self.kept)
            self._moments = self._of_step(problem)
            self.seen_in_training = self._moments is not None
            if self._moments is None:
                self._moments = self._of_own_pass(problem)
            meter.gradients += (1 + len(self._wants)) / 3 + (not self.seen_in_training)
        meter.provenance["engine"] = self._moments.engine
        if self.seen_in_training:
            meter.provenance["pass"] = "of the training itself"
        return self._moments

    def inner_products(self, direction_D: Tensor) -> Tensor:
        """(N,): <g_i, direction> of the examples of the step, whatever the parameters are at this moment."""
        moments = self._of_own_pass(self._problem(frozenset({"inner_products"}), direction_D))
        assert moments.inner_NL is not None
        return moments.inner_NL.sum(1)

    def keep(self) -> None:
        """Before the step: where the training's own pass was watched, what it leaves for readings after the step stays.
        Factors, for the slopes of single examples, and the gradient with its loss."""
        if self._watched is None or not (self._keeps_factors or self._keeps_gradient):
            return
        if self._keeps_factors and self.kept is None:
            self.kept, self.seen_in_training = KeptFactors.of(self._probe.layout), False
        try:
            again = None if self.seen_in_training else self._of_step(self._problem(frozenset(), kept=self.kept))
        except Exception:  # whoever needs it says so after the step
            again = None
        self.seen_in_training = self.seen_in_training or again is not None
        if not self.seen_in_training:
            self.kept = None
        elif self._keeps_gradient and self._watched is not None:
            self.trained = self._watched.loss, self._probe.layout.join(self._probe.unscaled_grads)

    def _of_own_pass(self, problem: SampleProblem) -> SampleMoments:
        self._probe.prepare()
        return sample_moments(problem, self._probe.batches, self._probe.settings.samples)

    def _of_step(self, problem: SampleProblem) -> SampleMoments | None:
        """From the watched pass; None where there is none that fits, and then it is not tried again."""
        probe = self._probe
        if self._watched is None or len(probe.batches) != 1 or probe.settings.samples not in ("auto", "fused"):
            return None
        if not probe.objective.pure:
            probe.guard()
        try:
            found = moments_of_step(problem, probe.batches[0], self._watched)
        except (torch.OutOfMemoryError, Undefined):
            raise
        except Exception:  # a loss that asks more of `call` than to be called, a model that has changed since
            found = None
        if found is None:
            self._watched = None
        return found

    def _problem(
        self, wants: frozenset[Want], direction_D: Tensor | None = None, kept: KeptFactors | None = None
    ) -> SampleProblem:
        probe = self._probe

        def pinned(*, differentiable: bool = True) -> AbstractContextManager[None]:
            return probe.running(held=False, differentiable=differentiable)

        graphs = probe.plans.setdefault("graphs", {})
        grads = None if direction_D is not None else probe.unscaled_grads
        return SampleProblem(
            probe.module, probe.layout, probe.objective, pinned, wants, direction_D, graphs, kept, grads
        )
