"""Fisher matrices: second moments of per-example gradients, with the targets of the data or with drawn ones.

Empirical, over the N examples of all batches, with g_i the gradient of example i in the unit of the loss (their mean is
the gradient):

    E = 1/N sum_i g_i g_i'.

It is the uncentred covariance of the gradient noise, not an approximation of curvature away from a good fit (Kunstner,
Balles and Hennig 2019, "Limitations of the empirical Fisher approximation for natural gradient descent").

Monte-Carlo: the training loss, whatever its reduction, is sum_e c_e nll_e / weight over the elements e of the batch (an
example, a token, a coordinate of the output), with nll_e the negative log-likelihood of the model's predictive
distribution and c_e >= 0 (class weights; 0 for ignored targets; 2 for squared error, whose distribution has unit
variance). With targets drawn from that distribution,

    F = 1/weight sum_i s_i s_i',      s_i = grad sum_{e in i} sqrt(c_e) nll_e(drawn target),

has the Gauss-Newton matrix of the training loss as its mean over draws, because the scores of different elements are
independent with mean zero (Martens 2020, "New insights and perspectives on the natural gradient method", section 9).

Neither holds an N x D matrix: with s the vector of sums over examples and J its Jacobian, both are J'J over a number.

Shapes: N = examples, C = classes, M = draws, K = sums of one batch (N, or M N).
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from instruments.layout import Layout
from instruments.objective import Batch
from instruments.operators.hessian import Context
from instruments.operators.jacobian import Jacobian
from instruments.operators.operator import Operator, released
from instruments.operators.predictive import DrawnTargets
from instruments.samples.independence import check_by_half, refuse_undefined, whole_batch
from instruments.samples.problem import SampleProblem

# In g, as for the Gauss-Newton matrix, whose products are the same but for the loss.
KEPT_PRODUCT = 1.6
REBUILT_PRODUCT = 2.6


@dataclass(frozen=True)
class Sums:
    """Of one batch: sums_K with a graph, what it weighs in the loss, and its examples."""

    sums_K: Tensor
    weight: Tensor | float
    examples: int


class FisherOperator(Operator):
    """sum_b J_b'J_b / divisor, J_b the Jacobian of the sums of `pieces[b]`; see the two functions that make one.

    Call `release()` before the optimizer steps: the graphs hold the parameters at their present version.
    """

    def __init__(
        self,
        pieces: Sequence[Callable[[], Sums]],
        layout: Layout,
        divisor: Callable[[Tensor | float, int], Tensor | float],
        *,
        name: str,
        keep_graphs: bool,
        context: Context,
    ) -> None:
        self._pieces, self._layout, self._divisor, self._context = pieces, layout, divisor, context
        self.size, self.dtype, self.device = layout.size, layout.dtype, layout.device
        self.price = KEPT_PRODUCT if keep_graphs else REBUILT_PRODUCT
        self.route = f"{name}, backward passes on a graph {'kept' if keep_graphs else 'rebuilt for each product'}"
        self._graphs = [self._graph(piece) for piece in pieces] if keep_graphs else None

    def matvec(self, v_D: Tensor) -> Tensor:
        if not self._pieces:
            raise released()
        v = self._layout.split(v_D)
        total_D = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        weight: Tensor | float = 0.0
        examples = 0
        with self._context(False):
            for i, piece in enumerate(self._pieces):
                graph = self._graphs[i] if self._graphs is not None else self._graph(piece)
                total_D += self._layout.join(graph.jacobian.vjp(graph.jacobian.jvp(v)))
                weight, examples = weight + graph.weight, examples + graph.examples
        return total_D / self._divisor(weight, examples)

    def release(self) -> None:
        """Free the graphs; the operator cannot be used afterwards."""
        self._graphs, self._pieces = None, []

    def _graph(self, piece: Callable[[], Sums]) -> "_Graph":
        with self._context(True), torch.enable_grad():
            sums = piece()
            return _Graph(Jacobian([sums.sums_K], self._layout.params), sums.weight, sums.examples)


@dataclass(frozen=True)
class _Graph:
    jacobian: Jacobian
    weight: Tensor | float
    examples: int


def empirical_fisher(
    problem: SampleProblem,
    batches: Sequence[Batch],
    *,
    keep_graphs: bool = True,
    context: Context = lambda forward: nullcontext(),
) -> FisherOperator:
    """E of all batches together, in the unit of `instruments.samples`: g_i = (N / denominator) grad of its own sum.

    `context` surrounds forwards and backwards as for the Hessian; `problem.running` is used to check that the examples
    do not interact. Raises Refusal where an example has no gradient of its own.
    """
    refuse_undefined(problem.module)
    for batch in batches:
        check_by_half(problem, batch, whole_batch(problem, batch)[0])

    def piece(batch: Batch) -> Sums:
        parts = problem.objective.parts(problem.module, batch)
        assert parts.sums_N is not None
        return Sums(parts.sums_N, _detached(parts.denominator), parts.examples)

    return FisherOperator(
        [lambda batch=batch: piece(batch) for batch in batches],  # type: ignore[misc]
        problem.layout,
        lambda denominator, examples: denominator**2 / examples,
        name="empirical Fisher",
        keep_graphs=keep_graphs,
        context=context,
    )


def monte_carlo_fisher(
    problem: SampleProblem,
    batches: Sequence[Batch],
    *,
    seed: int,
    draws: int = 1,
    keep_graphs: bool = True,
    context: Context = lambda forward: nullcontext(),
) -> FisherOperator:
    """F of all batches together, `draws` targets for each element averaged, weighted as the Hessian weighs batches.

    Targets are drawn once, at the first evaluation of a batch, by a generator of their own: the operator is one fixed
    matrix, and no global random state moves. Defined for `nn.CrossEntropyLoss` (weights, ignored targets, label
    smoothing, class probabilities as targets), `nn.BCEWithLogitsLoss` and `nn.MSELoss`; others raise Refusal.
    """
    pooled = problem.objective.pooled_by_denominator

    def piece(drawn: DrawnTargets) -> Sums:
        sums_MN, denominator = drawn.evaluate(problem.module)
        examples = sums_MN.shape[1]
        # A summed loss averages over batches by their examples, as `objective.addends` does.
        weight, share = (denominator, 1.0) if pooled else (float(examples), float(examples))
        return Sums((sums_MN * (share / draws) ** 0.5).reshape(-1), _detached(weight), examples)

    targets = [
        DrawnTargets(problem.objective, batch, seed=seed, stream=stream, draws=draws)
        for stream, batch in enumerate(batches)
    ]
    return FisherOperator(
        [lambda drawn=drawn: piece(drawn) for drawn in targets],  # type: ignore[misc]
        problem.layout,
        lambda weight, examples: weight,
        name=f"Monte-Carlo Fisher of {draws} draw{'s' if draws > 1 else ''}",
        keep_graphs=keep_graphs,
        context=context,
    )


def _detached(weight: Tensor | float) -> Tensor | float:
    return weight.detach() if isinstance(weight, Tensor) else weight
