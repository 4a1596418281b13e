"""The matrices of a step, made when asked for: Hessian, Gauss-Newton and Fisher of the loss on the held batches."""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal, TypeVar

import torch

from instruments.meter import Meter
from instruments.objective import Batch, addends
from instruments.operators.fisher import FisherOperator, empirical_fisher, monte_carlo_fisher
from instruments.operators.gauss_newton import Evaluation, GaussNewtonOperator
from instruments.operators.hessian import Context, Piece
from instruments.operators.ranks import Matrix, Ranks, RankSum
from instruments.operators.resort import LastResortHessian
from instruments.refusal import Refusal
from instruments.samples.problem import SampleProblem

if TYPE_CHECKING:
    from instruments.probe import Probe

Way = Literal["kept", "rebuilt", "forward"]
Curvature = LastResortHessian | GaussNewtonOperator | FisherOperator
Local = TypeVar("Local", LastResortHessian, GaussNewtonOperator)
Made = TypeVar("Made", LastResortHessian, GaussNewtonOperator, FisherOperator)


class Curvatures:
    """Each matrix is built for the first view that asks, billed to it, and shared until the probe is closed.

    Out of memory: graphs are rebuilt for each product instead of kept, then held batches are dropped. While `ranks` is
    set, Hessian and Gauss-Newton matrix are those of the batches of all its processes, and this one leads.
    """

    ranks: Ranks | None = None

    def __init__(self, probe: "Probe") -> None:
        self._probe: Probe = weakref.proxy(probe)  # a cycle would keep gradients and batches until it is collected
        self._made: dict[str, Curvature] = {}

    def release(self) -> None:
        """Free all graphs."""
        for operator in self._made.values():
            operator.release()
        self._made.clear()

    def hessian(self, meter: Meter) -> LastResortHessian | RankSum:
        """By double backward, or, where something has no second derivative, by differences, which the route says."""

        def build() -> LastResortHessian:
            held = self._probe.held
            pieces = [self._piece(batch) for batch in held.batches]
            return self._hessian(pieces, held.keep_graphs, self._around, meter)

        return self._everywhere("hessian", self._once("hessian", build, meter, 1.0), meter)

    def step_hessian(self, meter: Meter) -> LastResortHessian:
        """The Hessian on the step's own batches instead of the held ones."""
        if "step_hessian" not in self._made:
            self._refuse()
            pieces = [self._piece(batch) for batch in self._probe.batches]

            def build(keep: bool) -> LastResortHessian:
                return self._hessian(pieces, keep, self._around_step, meter)

            try:
                self._made["step_hessian"] = build(True)
                meter.gradients += 1.0
            except torch.OutOfMemoryError:
                self._made["step_hessian"] = build(False)
        operator = self._made["step_hessian"]
        assert isinstance(operator, LastResortHessian)
        meter.provenance["route"] = operator.route
        return operator

    def _hessian(self, pieces: list[Piece], keep: bool, context: Context, meter: Meter) -> LastResortHessian:
        """Whether all of the model can be differentiated twice is looked for once a run, and remembered."""
        found = self._probe.plans.setdefault("second derivatives", {})
        names = self._probe.layout.names
        operator = LastResortHessian(
            pieces, self._probe.layout, keep_graphs=keep, context=context, reason=found.get(names)
        )
        found.setdefault(names, operator.reason)
        meter.gradients += operator.looked
        return operator

    def gauss_newton(self, meter: Meter) -> GaussNewtonOperator | RankSum:
        """On a kept graph; where memory is short, by forward mode, or rebuilt where that has no rule."""

        def build() -> GaussNewtonOperator:
            probe = self._probe
            pieces = [self._through(batch) for batch in probe.held.batches]
            ways: tuple[Way, ...] = ("kept",) if probe.held.keep_graphs else ("forward", "rebuilt")
            for way in ways:
                try:
                    return GaussNewtonOperator(probe.module, pieces, probe.layout, products=way, context=self._around)
                except Refusal:
                    if way == ways[-1]:
                        raise
            raise AssertionError("there is at least one way")

        return self._everywhere("gauss_newton", self._once("gauss_newton", build, meter, 1.0), meter)

    def fisher(self, meter: Meter, seed: int | None = None) -> FisherOperator:
        """The empirical Fisher, or, with a seed, the one with targets drawn from the model's own predictions."""

        def build() -> FisherOperator:
            probe = self._probe
            probe.prepare()
            graphs = probe.plans.setdefault("graphs", {})
            problem = SampleProblem(
                probe.module, probe.layout, probe.objective, lambda: self._around(True), plans=graphs
            )
            keep = probe.held.keep_graphs
            if seed is None:
                return empirical_fisher(problem, probe.held.batches, keep_graphs=keep, context=self._around)
            return monte_carlo_fisher(
                problem, probe.held.batches, seed=seed, draws=1, keep_graphs=keep, context=self._around
            )

        price = 1.5 if seed is None else 1.0
        return self._once("fisher" if seed is None else f"drawn fisher {seed}", build, meter, price)

    def _everywhere(self, matrix: Matrix, local: Local, meter: Meter) -> Local | RankSum:
        if self.ranks is None:
            return local
        summed = RankSum(local, matrix, self.ranks)
        scope = f"sum over {self.ranks.count} processes"
        meter.provenance.update(scope=scope, examples=self.ranks.examples or "unknown", route=summed.route)
        return summed

    def _refuse(self) -> None:
        """Parameters of which this process holds a part."""
        probe = self._probe
        for name, p in zip(probe.layout.names, probe.layout.params, strict=True):
            if hasattr(p, "device_mesh") or getattr(p, "_fsdp_flattened", False) or hasattr(p, "_local_shard"):
                raise Refusal(
                    f"expected whole parameters, got '{name}' as a shard (FSDP, tensor parallel), whose second "
                    "derivatives are not supported; read curvature on a whole copy of the model."
                )

    def _once(self, name: str, build: Callable[[], Made], meter: Meter, gradients: float) -> Made:
        held = self._probe.held
        if name not in self._made:
            self._refuse()
        while name not in self._made:
            try:
                self._made[name] = build()
                meter.gradients += gradients * held.keep_graphs
            except torch.OutOfMemoryError as error:
                if not held.shrink():
                    raise Refusal(f"out of memory with a single probe batch: {error}") from error
        operator = self._made[name]
        meter.provenance.update(batch=held.label, examples=held.examples or "unknown", route=operator.route)
        return operator  # type: ignore[return-value]

    def _around(self, forward: bool) -> AbstractContextManager[None]:
        return self._probe.running(held=True, differentiable=True, forward=forward)

    def _around_step(self, forward: bool) -> AbstractContextManager[None]:
        return self._probe.running(held=False, differentiable=True, forward=forward)

    def _piece(self, batch: Batch) -> Piece:
        probe = self._probe
        return lambda: addends(probe.objective, probe.objective.parts(probe.module, batch))

    def _through(self, batch: Batch) -> Evaluation:
        probe = self._probe
        return lambda call: addends(probe.objective, probe.objective.parts(call, batch))
