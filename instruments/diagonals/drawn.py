"""The diagonal of the Fisher, which is that of the Gauss-Newton matrix, from gradients for drawn targets.

With targets drawn from the distribution that model and loss stand for, and s_i the score of example i,

    F_jj = 1/weight sum_i s_ij^2,      s_i = grad sum_{e in i} sqrt(c_e) nll_e(drawn target),

has the diagonal of the Gauss-Newton matrix of the training loss as its mean over draws (`instruments.operators.fisher`
has the c_e and the weight). The sums of squares come from the engines of per-example gradients, so that every entry
is an average over all examples, whatever the number of parameters: an entry whose s_ij are about normal has the
relative error sqrt(2 / (N M)). Random signs give an entry an error as large as the rest of its row.

(Martens 2020, "New insights and perspectives on the natural gradient method", section 9; Dangel, Kunstner and Hennig
2020, "BackPACK: packing more into backprop", DiagGGNMC.)

Shapes: N = examples, D = trainable scalars, M = draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from instruments.diagonals.draws import Draws
from instruments.guard import RandomStates
from instruments.objective import Batch, Call, FunctionObjective, Objective, Parts, no_examples
from instruments.operators import predictive
from instruments.operators.predictive import Predictive
from instruments.refusal import Refusal
from instruments.running import without_graph
from instruments.samples.independence import refuse_undefined
from instruments.samples.moments import EngineName, sample_moments
from instruments.samples.problem import SampleProblem

FORWARD, SQUARES = 1 / 3, 5 / 3
"""In g: drawing the targets, and the squares of one draw."""


@dataclass(frozen=True)
class _Drawn:
    """Of one batch: what the model is called with, M targets and sqrt(c_e) for every element, the batch's weight."""

    inputs: Any
    targets_M: Sequence[Tensor]
    roots: Tensor
    weight: Tensor | float
    random: bool


def drawn_diagonal(
    problem: SampleProblem, batches: Sequence[Batch], *, seed: int, draws: int, engine: EngineName = "auto"
) -> Draws:
    """M rows, each the diagonal of F for one draw of all targets, batches weighted as the Hessian weighs them.

    No global random state moves. Raises Refusal for losses whose distribution is not known, for examples that have no
    gradient of their own, and where masks are drawn anew for gradients that the targets were not drawn under.
    """
    refuse_undefined(problem.module)
    _, distribution = predictive._predictive(problem.objective)
    drawn = [_draw(problem, batch, (seed << 20) + stream, draws, engine) for stream, batch in enumerate(batches)]
    weight = sum((d.weight for d in drawn), start=0.0)
    scores = replace(problem, objective=_scores(distribution), wants=frozenset({"second_moment"}), direction_D=None)
    rows, engines = [], list[str]()
    for m in range(draws):
        found = sample_moments(scores, [(d.inputs, d.targets_M[m], d.roots) for d in drawn], engine)
        assert found.second_D is not None
        rows.append(found.second_D * (found.examples / weight))
        engines.append(found.engine)
    who = "; ".join(dict.fromkeys(engines))
    if "torch.func" in who and any(d.random for d in drawn):
        raise Refusal(
            "the model draws random numbers and torch.func computes its per-example gradients, under other masks than "
            "the targets were drawn under; read in eval mode by Cockpit(..., settings=ProbeSettings(mode='eval'))."
        )
    return Draws(torch.stack(rows), f"{draws} draws of the targets, {who}")


def can_draw(objective: Objective) -> bool:
    """Whether the distribution that the loss stands for is known."""
    try:
        predictive._predictive(objective)
    except Refusal:
        return False
    return True


def _scores(distribution: Predictive) -> FunctionObjective:
    """The sum of sqrt(c_e) nll_e over the elements of an example, for batches of inputs, drawn targets and roots."""

    def losses(call: Call, batch: Batch) -> Tensor:
        inputs, targets, roots = batch
        scores: Tensor = roots * distribution.nll(call(inputs), targets)
        return scores.reshape(scores.shape[0], -1).sum(1)

    return FunctionObjective(losses)


def _draw(problem: SampleProblem, batch: Batch, seed: int, draws: int, engine: EngineName) -> _Drawn:
    parts, outputs, random = without_graph(problem.plans, lambda: _seen(problem, batch, engine))
    if parts.sums_N is None:
        raise no_examples()
    loss, distribution = predictive._predictive(problem.objective)
    targets = batch[1]
    if not distribution.fits(outputs, targets):
        raise Refusal(
            f"targets of shape {tuple(targets.shape)} do not match outputs of shape {tuple(outputs.shape)} element by "
            "element, so it is not clear what to draw; give both a leading dimension of examples."
        )
    # A summed loss averages over batches by their examples, as `objective.addends` does.
    pooled = problem.objective.pooled_by_denominator
    weight, share = (parts.denominator, 1.0) if pooled else (float(parts.examples), float(parts.examples))
    roots = (share * distribution.coefficients(loss, outputs, targets)).sqrt()
    generator = torch.Generator(outputs.device).manual_seed(seed)
    numbers = outputs.nan_to_num()  # what is drawn where the model is not finite does not matter: the scores are NaN
    drawn = [distribution.draw(numbers, generator) for _ in range(draws)]
    return _Drawn(batch[0], drawn, roots, weight, random)


def _seen(problem: SampleProblem, batch: Batch, engine: EngineName) -> tuple[Parts, Tensor, bool]:
    """The loss of the batch, what the model gave for it, and whether random numbers were drawn."""
    outputs: list[Tensor] = []

    def call(*args: Any, **kwargs: Any) -> Tensor:
        outputs.append(problem.module(*args, **kwargs))
        return outputs[-1]

    # With the kernels of the engine: under attention with dropout others would draw other masks.
    with problem.running(differentiable=engine not in ("auto", "fused")):
        before = RandomStates.of(problem.module)
        parts = problem.objective.parts(call, batch).detached()
        return parts, outputs[0].detach(), before.moved()
