"""Per-example gradient statistics from one forward and one backward of the whole batch, for any model.

While the backward pass runs, the operation that uses a parameter is met with what it saved (its input) and the gradient
of its result; per-example gradients are products of these two (`rules`) and are reduced at once, so that no per-example
gradient of a whole layer is held. Which rows belong to which example, and whether the rules are right for this model,
is found by backward passes of single examples the first time that a graph is seen; parameters that do not agree, and
those without a rule, are left to torch.func or to one backward an example.

Shapes: N = examples of one batch, D = trainable scalars.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from instruments.guard import RandomStates
from instruments.objective import Batch, Parts, Undefined, no_examples
from instruments.refusal import Refusal
from instruments.samples import func_engine, loop_engine
from instruments.samples.axes import ExampleAxis, Profile, find_axes, profile
from instruments.samples.factors import Factor, Together, blocks
from instruments.samples.graph import Node, Use, deepest, find_uses
from instruments.samples.independence import refuse_hidden_parameters
from instruments.samples.problem import BatchMoments, SampleProblem, Statistics, flat_pieces
from instruments.samples.rules import RULES, factor
from instruments.samples.watched import Watched, output_key

AGREE = {torch.float64: 1e-8, torch.float32: 1e-3}
COARSE = 5e-2  # of half precision
MEAN_AGREES = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Of the gradient of training with the mean of the g_i, relative to its size."""


@dataclass(frozen=True)
class Plan:
    """What is known of a graph: where the examples are in each use's result, and which parameters go elsewhere.

    `certain`: no other layout would fit what was seen, so that it holds for other numbers too. `deepest`: the uses that
    a backward pass has to reach. `trains_on`: whether the gradient of the training step may be the mean of the g_i.
    """

    axes: tuple[ExampleAxis | None, ...]
    elsewhere: frozenset[int]
    certain: bool
    deepest: tuple[int, ...]
    trains_on: bool = True


@dataclass(frozen=True)
class Check:
    """The gradient of a weighted sum of the losses by a backward pass of its own, to be compared with the same sum of
    the gradients that were read."""

    weight_N: Tensor
    grads: Sequence[Tensor | None]


def moments_of_step(problem: SampleProblem, batch: Batch, seen: Watched) -> BatchMoments | None:
    """From what was seen of the training's own pass, or None where that is not the pass of this loss on this batch.

    The loss of what the model gave then must send the same gradient back into it, and the gradients of the examples
    must add up to `.grad`. They are in the unit of the loss that was trained.
    """
    assert problem.grads is not None
    leaf, calls = seen.output.detach().requires_grad_(), 0

    def given(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return leaf

    with torch.enable_grad():
        parts = problem.objective.parts(given, batch)
        if parts.sums_N is None or calls != 1 or not parts.total.requires_grad:
            return None
        (grad,) = torch.autograd.grad(parts.loss, leaf, allow_unused=True)
    n, there = parts.examples, seen.output_grad
    if grad is None or there is None or any(axis is None or axis.examples != n for axis in seen.plan.axes):
        return None
    if not bool((grad - there).norm() <= MEAN_AGREES[problem.layout.dtype] * grad.norm()):
        return None
    losses_N = parts.sums_N / parts.denominator
    work = _Backward(problem, seen.uses, seen.plan, replace(parts, denominator=1.0, sums_N=losses_N), [],
                     problem.layout.flat(problem.grads))
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
        plan, checks = (known, []) if known is not None else _explore(problem, parts, uses)
        if reorders or known is None:
            checks.append(_check(problem, parts.sums_N, _mixed(parts.sums_N)))
        shortened = not checks and _may_stop_early(problem, plan, uses)
        mean = problem.layout.flat(problem.grads) if shortened and problem.grads is not None else None
        work = _Backward(problem, uses, plan, parts, checks, mean)
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
        problem.plans[key] = plan
        if not plan.elsewhere and not reorders and _all_once(problem, uses):
            _remember_output(problem, batch, plan, uses)
    statistics = _filled(problem, parts.examples, found)
    whole = BatchMoments.of(problem, statistics, sums, parts.denominator, "fused")
    return whole if not plan.elsewhere else _with_others(problem, batch, plan.elsewhere, whole)


def _may_stop_early(problem: SampleProblem, plan: Plan, uses: Sequence[Use]) -> bool:
    """Whether `.grad` is there, and every parameter is used once and has a rule."""
    return problem.grads is not None and plan.trains_on and not plan.elsewhere and _all_once(problem, uses)


def _all_once(problem: SampleProblem, uses: Sequence[Use]) -> bool:
    return len({use.index for use in uses}) == len(uses) == len(problem.layout.params)


def _remember_output(problem: SampleProblem, batch: Batch, plan: Plan, uses: Sequence[Use]) -> None:
    """The plan by the graph of the model's output, for `watched`: of a model that is called once, gives one tensor,
    draws no random number and packs no saved tensor (a checkpoint unpacks them by running the forward again)."""
    outputs: list[Any] = []
    with torch.enable_grad(), problem.running(differentiable=False):
        before = RandomStates.of(problem.module)
        handle = problem.module.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            with torch.autograd.graph.disable_saved_tensors_hooks("watched"):
                problem.objective.parts(problem.module, batch)
        except RuntimeError:
            return
        finally:
            handle.remove()
        random = before.moved()
    if len(outputs) != 1 or not isinstance(outputs[0], Tensor) or outputs[0].grad_fn is None or random:
        return
    there, graph, _ = find_uses(outputs[0].grad_fn, problem.layout.params)
    places = {(use.index, use.slot, use.name, use.shape): axis for use, axis in zip(uses, plan.axes, strict=True)}
    axes = [places.get((use.index, use.slot, use.name, use.shape)) for use in there]
    if len(there) == len(uses) and None not in axes:
        problem.plans[output_key(problem.layout, graph)] = replace(plan, axes=tuple(axes), deepest=())


def _check(problem: SampleProblem, losses_N: Tensor, weight_N: Tensor) -> Check:
    mixed = torch.dot(losses_N, weight_N.to(losses_N))
    try:
        return Check(weight_N, torch.autograd.grad(mixed, problem.layout.params, retain_graph=True, allow_unused=True))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise Refusal(f"the losses of single examples cannot be differentiated: {error}") from error


def _mixed(losses_N: Tensor) -> Tensor:
    """A weight of its own for each example (multiples of the golden ratio, modulo 1): exchanged examples show."""
    return (torch.arange(1, len(losses_N) + 1, device=losses_N.device) * 0.6180339887498949) % 1 + 0.5


def _explore(problem: SampleProblem, parts: Parts, uses: Sequence[Use]) -> tuple[Plan, list[Check]]:
    """Where the examples are, and the whole gradients of three of them."""
    n = parts.examples
    losses_N = parts.sums_N
    assert losses_N is not None
    seen: dict[Node, list[tuple[int, Profile]]] = {use.node: [] for use in uses}
    checks: list[Check] = []
    for k in sorted({0, n // 2, n - 1}):

        def look(grads: tuple[Tensor | None, ...], k: int, node: Node) -> None:
            if grads[0] is not None:
                seen[node].append((k, profile(grads[0], n)))

        handles = [node.register_prehook(lambda grads, k=k, node=node: look(grads, k, node)) for node in seen]
        try:
            checks.append(_check(problem, losses_N, (torch.arange(n, device=losses_N.device) == k).to(losses_N)))
        finally:
            for handle in handles:
                handle.remove()
    fitting = {node: list(islice(find_axes(found, n), 2)) for node, found in seen.items()}
    axes = {node: next(iter(found), None) for node, found in fitting.items()}
    without = {use.index for use in uses if axes[use.node] is None or use.name not in RULES}
    # Where the loss of an example reached nothing, zeros were seen, which say nothing of another step.
    certain = all(_reached(seen[node], len(checks)) and len(fitting[node]) < 2 + (n == 1) for node in seen)
    return Plan(tuple(axes[use.node] for use in uses), frozenset(without), certain, deepest(uses)), checks


def _reached(found: Sequence[tuple[int, Profile]], examples: int) -> bool:
    return len(found) >= examples and all(bool(at.any()) for _, by_dim in found for at in by_dim.values())


class _Backward:
    """One backward pass with hooks on the operations that use parameters.

    `mean` is the gradient that training has computed, flat by parameter, where the pass is to stop early. Without it, and where inner
    products with the sum are wanted, a parameter waits until its operation has run and its own gradient is there.
    """

    def __init__(
        self,
        problem: SampleProblem,
        uses: Sequence[Use],
        plan: Plan,
        parts: Parts,
        checks: Sequence[Check],
        mean: Sequence[Tensor] | None,
    ) -> None:
        self._problem, self._parts, self._checks = problem, parts, checks
        self._by_parameter: dict[int, list[int]] = {}
        for number, use in enumerate(uses):
            self._by_parameter.setdefault(use.index, []).append(number)
        self._uses, self._plan, self._mean = uses, plan, mean
        self._factors: dict[int, Factor | None] = {}
        self._found: dict[int, Statistics] = {}
        self._sums: dict[int, Tensor] = {}
        self._sketches: list[tuple[int, Tensor, Tensor]] = []
        self._given = mean
        if problem.direction_D is not None:
            self._given = flat_pieces(problem.layout, problem.direction_D)
        self._waits = self._given is None and "inner_products" in problem.wants
        if problem.kept is not None:
            problem.kept.clear()
            problem.kept.unit = parts.examples / parts.denominator
            assert parts.sums_N is not None
            problem.kept.losses_N = (parts.sums_N * problem.kept.unit).detach()

    def run(self) -> tuple[Sequence[Tensor], dict[int, Statistics]]:
        """sum g_i over all parameters (their mean, where that is known), and the statistics of those parameters that
        could be read."""
        params, total = self._problem.layout.params, self._parts.total
        handles = self._hooks()
        try:
            if self._mean is None:
                grads = torch.autograd.grad(total, params, allow_unused=True)
            else:
                self._stop_early()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # tensors that may be looked at only once, such as those of a checkpoint
            raise Refusal(f"this graph cannot be read while it runs backward: {error}") from error
        finally:
            for handle in handles:
                handle.remove()
        if self._mean is not None:
            return self._mean, self._found
        with torch.no_grad():
            for index, p in enumerate(params):
                if index not in self._plan.elsewhere and index not in self._found:
                    self._finish(index, p, grads[index])
        return self._problem.layout.flat(grads), self._found

    def _hooks(self) -> list[Any]:
        handles = []
        for node, mine in self._numbers(range(len(self._uses))).items():
            handles.append(node.register_prehook(lambda grads, mine=mine: self._before(mine, grads[0])))
            if self._waits:
                handles.append(node.register_hook(lambda out, grads, mine=mine: self._after(mine, out)))
        return handles

    def _numbers(self, some: Iterable[int]) -> dict[Node, list[int]]:
        """Uses by their operation."""
        numbers: dict[Node, list[int]] = {}
        for number in some:
            if self._uses[number].index not in self._plan.elsewhere:
                numbers.setdefault(self._uses[number].node, []).append(number)
        return numbers

    def _stop_early(self) -> None:
        """The deepest operations are reached and not run: no hook of theirs is called."""
        last = self._numbers(self._plan.deepest)
        edges = [GradientEdge(node, 0) for node in last]
        deltas = torch.autograd.grad(self._parts.total, edges, allow_unused=True)
        with torch.no_grad():
            for mine, delta in zip(last.values(), deltas, strict=True):
                self._before(mine, delta)
            for number, made in self._factors.items():
                if made is not None:
                    self._read(self._uses[number], made)

    def _before(self, mine: Sequence[int], delta: Tensor | None) -> None:
        """The operation is about to run backward: what it saved is still there."""
        if delta is None:
            return
        for number in mine:
            use, axis = self._uses[number], self._plan.axes[number]
            assert axis is not None
            made = factor(use, axis, delta)
            now = not self._waits and (self._mean is None or not use.chain)
            if made is None or not now or len(self._by_parameter[use.index]) > 1:
                self._factors[number] = made
            else:
                self._read(use, made)

    def _seen(self, use: Use) -> Tensor:
        """The given direction as the operation sees it."""
        assert self._given is not None
        return use.from_parameter(self._given[use.index].view(self._problem.layout.params[use.index].shape))

    def _after(self, mine: Sequence[int], out: tuple[Tensor | None, ...]) -> None:
        """The gradient of the whole batch is there too: a parameter that is used once is done with."""
        for number in mine:
            use, made = self._uses[number], self._factors.get(number)
            if made is None or len(self._by_parameter[use.index]) > 1:
                continue
            whole = out[use.slot]
            if use.flipped and whole is not None:
                whole = whole.mT
            if whole is None or tuple(whole.shape) != use.shape or whole.layout is not torch.strided:
                whole = made.rows(slice(None)).sum(0)
            self._read(use, made, whole)
            del self._factors[number]

    def _read(self, use: Use, made: Factor, direction: Tensor | None = None) -> None:
        """All that is wanted of a parameter that is used once."""
        if direction is None and self._given is not None and "inner_products" in self._problem.wants:
            direction = self._seen(use)
        found = made.statistics(self._problem.wants, direction)
        self._found[use.index] = use.statistics_to_parameter(found)
        if self._problem.kept is not None:
            self._problem.kept.keep(use.index, use, made)
        if self._checks:
            self._sums[use.index] = use.rows_to_parameter(self._weighted(made).view(-1, *use.shape))
        if self._mean is not None:
            sketch = made.sketch(self._seen(use) if direction is None else direction)
            if sketch is not None:
                self._sketches.append((use.index, *sketch))

    def of_factors(self, factors: Mapping[int, Factor]) -> BatchMoments | None:
        """Without a pass: what is to be read of each use is there. None where it is not of the gradient of training."""
        for number, made in factors.items():
            self._read(self._uses[number], made)
        return self.averaged()

    def averaged(self) -> BatchMoments | None:
        """The moments round the gradient of training, or None where that is not the mean of the g_i."""
        if self._mean is None or len(self._found) < len(self._problem.layout.params):
            return None
        ordered = [self._found[index] for index in range(len(self._found))]
        denominator = self._parts.denominator
        whole = BatchMoments.of(self._problem, ordered, self._mean, denominator, "fused", averaged=True)
        return whole if self._adds_up(whole.norms_sq_NL) else None

    def _adds_up(self, norms_sq_NL: Tensor) -> bool:
        """Whether what was taken for the mean of the g_i is their mean: random contractions of both agree, for every
        parameter, to what single examples leave of rounding."""
        if len(self._sketches) < len(self._problem.layout.params):
            return False
        sums, wholes = ([sketch[k] for sketch in self._sketches] for k in (1, 2))
        n, denominator, dtype = len(norms_sq_NL), float(self._parts.denominator), norms_sq_NL.dtype
        errors = torch._foreach_norm(torch._foreach_add(sums, wholes, alpha=-denominator))
        norms = torch.stack([t.to(dtype) for t in (*errors, *torch._foreach_norm(wholes))]).double().cpu().numpy()
        errors_L, sizes_L = norms.reshape(2, -1)
        order = [index for index, _, _ in self._sketches]
        spread_L = np.sqrt(n * norms_sq_NL.double().sum(0).cpu().numpy()[order])
        allowed_L = MEAN_AGREES[dtype] * (denominator * sizes_L + 1e-3 * spread_L) + 1e-30
        return bool((errors_L <= allowed_L).all())

    def _finish(self, index: int, p: Tensor, grad: Tensor | None) -> None:
        """A parameter that is used several times, or not at all."""
        numbers = self._by_parameter.get(index, [])
        parts = [self._factors.pop(number, None) for number in numbers]
        present = [part for part in parts if part is not None]
        if len(present) < len(parts):
            return
        made = Together([self._uses[number] for number in numbers], present, self._parts.examples, p)
        direction = None
        if "inner_products" in self._problem.wants:
            whole = torch.zeros_like(p) if grad is None else grad.to_dense()
            direction = whole if self._given is None else self._given[index]
        self._found[index] = made.statistics(self._problem.wants, direction)
        if self._problem.kept is not None:
            self._problem.kept.keep(index, None, made)
        if self._checks:
            self._sums[index] = self._weighted(made)

    def _weighted(self, made: Factor) -> Tensor:
        """The sums of the checks, (checks, d), from a bounded number of gradients at a time."""
        weight_KN = torch.stack([check.weight_N for check in self._checks])
        each = made.rows(slice(0, 1))
        total = each.new_zeros(len(weight_KN), each.numel())
        for some in blocks(self._parts.examples, each.numel(), each):
            total += weight_KN[:, some].to(each.dtype) @ made.rows(some).flatten(1)
        return total

    def agreeing(self) -> frozenset[int]:
        """Parameters for which every check gives what its backward pass gave."""
        good = []
        for index, sums_Kd in self._sums.items():
            p = self._problem.layout.params[index]
            true = [check.grads[index] for check in self._checks]
            true_Kd = torch.stack([p.new_zeros(p.numel()) if g is None else _flat(g) for g in true]).to(sums_Kd)
            error_K, scale_K = (sums_Kd - true_Kd).norm(dim=1), true_Kd.norm(dim=1)
            allowed_K = AGREE.get(p.dtype, COARSE) * (scale_K + 1e-3 * scale_K.max()) + 1e-30
            if index in self._found and not bool((error_K > allowed_K).any()):
                good.append(index)
        return frozenset(good)


def _flat(g: Tensor) -> Tensor:
    return (g if g.layout is torch.strided else g.to_dense()).reshape(-1)


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
