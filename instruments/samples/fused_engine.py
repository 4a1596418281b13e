"""Per-example gradient statistics from one forward and one backward of the whole batch, for any model.

While the backward pass runs, the operation that uses a parameter is met with what it saved (its input) and the gradient
of its result; per-example gradients are products of these two (`rules`) and are reduced at once, so that no per-example
gradient of a whole layer is held. Which rows belong to which example, and whether the rules are right for this model,
is found by backward passes of single examples the first time that a graph is seen; parameters that do not agree, and
those without a rule, are left to torch.func or to one backward an example.

Shapes: N = examples of one batch, D = trainable scalars.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from instruments.objective import Batch, Undefined, no_examples
from instruments.refusal import Refusal
from instruments.samples import func_engine, loop_engine
from instruments.samples.backward_pass import MEAN_AGREES, BackwardPass
from instruments.samples.exploration import (
    Plan,
    all_once,
    check,
    explore,
    loss_graph,
    mixed,
    remember,
    remember_output,
)  # fmt: skip
from instruments.samples.graph import Use, find_uses
from instruments.samples.independence import refuse_hidden_parameters, refuse_undefined
from instruments.samples.problem import BatchMoments, SampleProblem, Statistics
from instruments.samples.watched import Watched, same_arguments


def moments_of_step(problem: SampleProblem, batch: Batch, seen: Watched) -> BatchMoments | None:
    """From what was seen of the training's own pass, or None where that is not the pass of this loss on this batch.

    The loss of what the model gave then must be the same, and send the same gradient back into it; the model must have
    been called with the same; and the gradients of the examples must add up to `.grad`. They are in the unit of the
    loss that was trained.
    """
    refuse_undefined(problem.module)
    if problem.grads is None or [id(p) for p in seen.layout.params] != [id(p) for p in problem.layout.params]:
        return None
    leaf, calls = seen.output.detach().requires_grad_(), list[Any]()

    def given(*args: Any, **kwargs: Any) -> Tensor:
        calls.append((args, kwargs))
        return leaf

    with torch.enable_grad():
        parts = problem.objective.parts(given, batch)
        if parts.sums_N is None or not parts.total.requires_grad:
            return None
        if len(calls) != 1 or not same_arguments(calls[0], seen.called_with):
            return None
        if loss_graph(parts, leaf) != seen.plan.loss_graph:
            return None
        (grad,) = torch.autograd.grad(parts.loss, leaf, allow_unused=True)
    n, there, close = parts.examples, seen.output_grad, MEAN_AGREES[problem.layout.dtype]
    if grad is None or there is None or any(axis is None or axis.examples != n for axis in seen.plan.axes):
        return None
    loss, trained = parts.loss.detach(), seen.loss.to(parts.loss)
    if not bool(((grad - there).norm() <= close * grad.norm()) & ((loss - trained).abs() <= close * loss.abs())):
        return None
    losses_N = parts.sums_N / parts.denominator
    work = BackwardPass(
        problem,
        seen.uses,
        seen.plan,
        replace(parts, denominator=1.0, sums_N=losses_N),
        [],
        problem.layout.flat(problem.grads),
    )
    with torch.no_grad():
        return work.of_factors(seen.factors)


def moments(problem: SampleProblem, batch: Batch) -> BatchMoments:
    """One forward and one backward, and, for a graph that was not seen before, three backward passes to check.

    Where the gradient that training has computed is the mean of the g_i, the backward pass stops at the operations that
    use parameters: the gradients of these, a third of the pass, are there already.
    """
    with torch.enable_grad(), problem.running(differentiable=False):
        parts = problem.objective.parts(problem.module, batch)
        if parts.sums_N is None:
            raise no_examples()
        if not parts.total.requires_grad:
            raise Refusal("the loss does not depend on any trained parameter.")
        uses, graph, reorders = find_uses(parts.total.grad_fn, problem.layout.params)
        key = (parts.examples, problem.layout.names, graph)
        known = problem.plans.get(key)
        plan, checks = (known, []) if known is not None else explore(problem, parts, uses)
        if reorders or known is None:
            checks.append(check(problem, parts.sums_N, mixed(parts.sums_N)))
        shortened = not checks and _may_stop_early(problem, plan, uses)
        mean = problem.layout.flat(problem.grads) if shortened and problem.grads is not None else None
        work = BackwardPass(problem, uses, plan, parts, checks, mean)
        sums, found = work.run()
    if mean is not None:
        early = work.averaged()
        if early is not None:
            return early
        if all(bool(g.isfinite().all()) for g in mean):  # a gradient that overflowed says nothing of the next
            problem.plans[key] = replace(plan, trains_on=False)
        return moments(replace(problem, grads=None), batch)
    if checks:
        found = {index: found[index] for index in work.agreeing()}
        if problem.kept is not None and len(found) < len(problem.layout.params):
            problem.kept.clear()
    plan = replace(plan, elsewhere=frozenset(range(len(problem.layout.params))) - found.keys())
    if known is None and plan.certain and all(bool(v.isfinite().all()) for v in sums):
        remember(problem.plans, key, plan)
        if not plan.elsewhere and not reorders and all_once(problem, uses):
            remember_output(problem, batch, plan, uses)
    statistics = _filled(problem, parts.examples, found)
    whole = BatchMoments.of(problem, statistics, sums, parts.denominator, "fused")
    return whole if not plan.elsewhere else _with_others(problem, batch, plan.elsewhere, whole)


def _may_stop_early(problem: SampleProblem, plan: Plan, uses: Sequence[Use]) -> bool:
    """Whether `.grad` is there, and every parameter is used once and has a rule."""
    return problem.grads is not None and plan.trains_on and not plan.elsewhere and all_once(problem, uses)


def _filled(problem: SampleProblem, examples: int, found: Mapping[int, Statistics]) -> list[Statistics]:
    """One entry a parameter; zeros where another engine will put its own."""

    def nothing(p: Tensor) -> Statistics:
        zeros_N = p.new_zeros(examples)
        return Statistics(zeros_N, p.new_zeros(p.numel()), zeros_N, p.new_zeros(examples, examples))

    return [found[i] if i in found else nothing(p) for i, p in enumerate(problem.layout.params)]


def _with_others(problem: SampleProblem, batch: Batch, chosen: frozenset[int], whole: BatchMoments) -> BatchMoments:
    """The parameters that have no rule, by torch.func or else by one backward an example, put in their places."""
    part, reasons = problem.only(chosen), []
    for name, engine in (("torch.func", func_engine.moments), ("loop", loop_engine.moments)):
        try:
            other = engine(part, batch)
            if name != "loop":
                refuse_hidden_parameters(part, batch, other.sums)
            break
        except Undefined:
            raise
        except Refusal as refusal:
            reasons.append(f"{name}: {refusal}")
    else:
        raise Refusal("no engine could compute per-example gradients. " + " | ".join(reasons))
    columns = sorted(chosen)
    if len(columns) == len(problem.layout.params):
        return other
    device = whole.norms_sq_NL.device
    cells = (torch.arange(len(whole.norms_sq_NL), device=device).unsqueeze(1), torch.tensor(columns, device=device))

    def placed(into: Tensor | None, values: Tensor | None) -> Tensor | None:
        return None if into is None or values is None else into.index_put(cells, values)

    def mixed(mine: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
        theirs = dict(zip(columns, others, strict=True))
        return [theirs.get(index, piece) for index, piece in enumerate(mine)]

    gram_NN = None if whole.gram_NN is None or other.gram_NN is None else whole.gram_NN + other.gram_NN
    norms_sq_NL = placed(whole.norms_sq_NL, other.norms_sq_NL)
    assert norms_sq_NL is not None
    return BatchMoments(
        norms_sq_NL,
        mixed(whole.sums, other.sums),
        whole.denominator,
        f"fused; {name} for {len(columns)} of {len(problem.layout.params)} parameters",
        None if whole.squares is None or other.squares is None else mixed(whole.squares, other.squares),
        placed(whole.inner_NL, other.inner_NL),
        gram_NN,
    )
