"""Per-example gradient statistics of one step, by whichever engine can.

With loss = total / denominator over N examples (`instruments.objective`), example i has the gradient
g_i = (N / denominator) grad(its sum), and the mean of the g_i is the gradient of the loss. No engine holds an N x D
matrix beyond a bounded chunk.

Shapes: N = examples of the step (all its micro-batches), D = trainable scalars, L = trained parameter tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from instruments.layout import Layout
from instruments.objective import Batch, Undefined
from instruments.refusal import Refusal
from instruments.samples import backpack_engine, func_engine, fused_engine, loop_engine
from instruments.samples.independence import refuse_hidden_parameters, refuse_undefined
from instruments.samples.problem import BatchMoments, Engine, SampleProblem
from instruments.samples.watched import Watched

Array = npt.NDArray[np.float64]
EngineName = Literal["auto", "fused", "backpack", "torch.func", "loop"]
ENGINES: dict[str, Engine] = {
    "fused": fused_engine.moments,
    "torch.func": func_engine.moments,
    "loop": loop_engine.moments,
    "backpack": backpack_engine.moments,
}
AUTO = ("fused", "torch.func", "loop")


@dataclass(frozen=True)
class SampleMoments:
    """Statistics of the g_i. What was not asked for is None.

    `norms_sq_NL`: |g_i|^2 by parameter tensor; `mean`: mean of the g_i; `second`: mean of the g_i^2, elementwise, both
    flat by parameter tensor; `inner_NL`: <g_i, mean> by parameter tensor; `gram_NN`: <g_i, g_j>; `engine`: who computed
    them. The mean may be the gradient that stands in `.grad`: it is to be read, and copied to be kept.
    """

    layout: Layout
    norms_sq_NL: Tensor
    mean: Sequence[Tensor]
    engine: str
    second: Sequence[Tensor] | None = None
    inner_NL: Tensor | None = None
    gram_NN: Tensor | None = None

    @cached_property
    def mean_D(self) -> Tensor:
        return torch.cat(list(self.mean))

    @cached_property
    def second_D(self) -> Tensor | None:
        return None if self.second is None else torch.cat(list(self.second))

    @property
    def examples(self) -> int:
        return self.norms_sq_NL.shape[0]

    @cached_property
    def norms_sq_N(self) -> Tensor:
        return self.norms_sq_NL.sum(1)

    # What follows is small and on the host, in float64: one transfer for all who ask.

    @cached_property
    def _norms_sq_NL(self) -> Array:
        return _on_host(self.norms_sq_NL)

    @cached_property
    def _inner_NL(self) -> Array:
        assert self.inner_NL is not None
        return _on_host(self.inner_NL)

    @cached_property
    def inner_N(self) -> Array:
        """<g_i, mean>, (N,); needs `inner_NL`."""
        inner_N: Array = self._inner_NL.sum(1)
        return inner_N

    @cached_property
    def sum_of_squares_L(self) -> Array:
        """A = sum over examples of |g_i|^2, by parameter tensor."""
        a_L: Array = self._norms_sq_NL.sum(0)
        return a_L

    @cached_property
    def square_of_sum_L(self) -> Array:
        """Q = |sum over examples of g_i|^2, by parameter tensor."""
        norms = torch._foreach_norm(list(self.mean), dtype=torch.float64)
        q_L: Array = np.square(self.examples * _on_host(torch.stack(norms)))
        return q_L

    @cached_property
    def left_out_sums(self) -> tuple[Array, Array]:
        """A and Q by parameter tensor without each example in turn, (N, L) both; needs `inner_NL`.

        Without example i they are A - a_i and Q - 2 N <g_i, mean> + a_i: no further pass over the model.
        """
        a_NL = self._norms_sq_NL
        return self.sum_of_squares_L - a_NL, self.square_of_sum_L - 2 * self.examples * self._inner_NL + a_NL

    @cached_property
    def left_out_totals(self) -> tuple[Array, Array]:
        """The same over all parameters together, (N,) both."""
        a_N = self._norms_sq_NL.sum(1)
        return a_N.sum() - a_N, self.square_of_sum_L.sum() - 2 * self.examples * self.inner_N + a_N


def _on_host(t: Tensor) -> Array:
    array: Array = t.double().cpu().numpy()
    return array


def sample_moments(problem: SampleProblem, batches: Sequence[Batch], engine: EngineName = "auto") -> SampleMoments:
    """Moments of the step's micro-batches together, as if they were one batch.

    "auto" takes the fused engine, which leaves single parameters to torch.func or to a backward pass an example, and
    these two for the whole where it cannot read the model at all. Raises Refusal where a gradient of one example is not
    defined, and where all pairs of examples are asked for over several micro-batches.
    """
    refuse_undefined(problem.module)
    if "gram" in problem.wants and len(batches) > 1:
        raise Refusal("products of pairs of examples are read within one batch, not over accumulated micro-batches.")
    reasons = []
    for name in AUTO if engine == "auto" else (engine,):
        try:
            return _over_batches(problem, batches, name)
        except Refusal as refusal:
            if isinstance(refusal, Undefined) or engine != "auto":
                raise
            reasons.append(f"{name}: {refusal}")
    raise Refusal("no engine could compute per-example gradients. " + " | ".join(reasons))


def moments_of_step(problem: SampleProblem, batch: Batch, seen: Watched) -> SampleMoments | None:
    """The moments from what was seen of the training's own pass; None where they need a pass of their own."""
    found = fused_engine.moments_of_step(problem, batch, seen)
    return None if found is None else _scaled(problem.layout, [found], False)


def _over_batches(problem: SampleProblem, batches: Sequence[Batch], name: str) -> SampleMoments:
    """Inner products with the mean of several batches need that mean first: a pass for it, and one for them."""
    given = problem.direction_D is not None
    if given or len(batches) > 1:
        problem = replace(problem, grads=None)  # the gradient of all batches is that of none
    if len(batches) > 1 and "inner_products" in problem.wants and not given:
        first = _run(replace(problem, wants=frozenset()), batches, name)
        problem = replace(problem, direction_D=torch.cat(_added([part.sums for part in first])))
    return _scaled(problem.layout, _run(problem, batches, name), given)


def _run(problem: SampleProblem, batches: Sequence[Batch], name: str) -> list[BatchMoments]:
    parts = [ENGINES[name](problem, batch) for batch in batches]
    if name in ("torch.func", "backpack"):
        for part, batch in zip(parts, batches, strict=True):
            refuse_hidden_parameters(problem, batch, part.sums)
    return parts


def _scaled(layout: Layout, parts: Sequence[BatchMoments], given: bool) -> SampleMoments:
    """From sums of losses to the loss: g_i by N / denominator, and means over the examples of all batches.

    Inner products are with the sum of the gradients, which becomes their mean, or with a direction that was `given`.
    The sums and squares are changed in place.
    """
    denominator = sum((part.denominator for part in parts), start=0.0)
    norms_sq_NL = torch.cat([part.norms_sq_NL for part in parts]) if len(parts) > 1 else parts[0].norms_sq_NL
    n, averaged = norms_sq_NL.shape[0], parts[0].averaged
    factor = n / denominator
    sums, second = _added([part.sums for part in parts]), None
    if all(part.squares is not None for part in parts):
        second = _added([part.squares for part in parts if part.squares is not None])
        torch._foreach_mul_(second, factor**2 / n)
    if not averaged:
        torch._foreach_div_(sums, denominator)
    inner = [part.inner_NL for part in parts if part.inner_NL is not None]
    gram_NN = parts[0].gram_NN
    return SampleMoments(
        layout,
        norms_sq_NL * factor**2,
        sums,
        parts[0].engine,
        second,
        torch.cat(inner) * (factor if given or averaged else factor / denominator) if inner else None,
        None if gram_NN is None else gram_NN * factor**2,
    )


def _added(by_batch: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Of several batches, tensor by tensor."""
    return (
        list(by_batch[0]) if len(by_batch) == 1 else [torch.stack(same).sum(0) for same in zip(*by_batch, strict=True)]
    )
