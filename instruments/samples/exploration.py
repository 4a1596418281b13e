"""What has to be found out about a graph once: where the examples are, and whether the rules hold for it.

By backward passes of single examples: their gradients are zero where the other examples are, and their whole gradients
are what the rules must give.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from instruments.guard import RandomStates
from instruments.objective import Batch, Parts
from instruments.refusal import Refusal
from instruments.samples.axes import ExampleAxis, Profile, find_axes, profile
from instruments.samples.graph import Node, Use, deepest, find_uses
from instruments.samples.problem import SampleProblem
from instruments.samples.rules import RULES
from instruments.samples.watched import output_key

MOST_PLANS = 256


@dataclass(frozen=True)
class Plan:
    """What is known of a graph: where the examples are in each use's result, and which parameters go elsewhere.

    `certain`: no other layout would fit what was seen, so that it holds for other numbers too. `deepest`: the uses that
    a backward pass has to reach. `trains_on`: whether the gradient of the training step may be the mean of the g_i.
    `loss_graph`: that of the loss above the model's output, in a plan for `watched`.
    """

    axes: tuple[ExampleAxis | None, ...]
    elsewhere: frozenset[int]
    certain: bool
    deepest: tuple[int, ...]
    trains_on: bool = True
    loss_graph: int = 0


@dataclass(frozen=True)
class Check:
    """The gradient of a weighted sum of the losses by a backward pass of its own, to be compared with the same sum of
    the gradients that were read."""

    weight_N: Tensor
    grads: Sequence[Tensor | None]


def explore(problem: SampleProblem, parts: Parts, uses: Sequence[Use]) -> tuple[Plan, list[Check]]:
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
            checks.append(check(problem, losses_N, (torch.arange(n, device=losses_N.device) == k).to(losses_N)))
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


def check(problem: SampleProblem, losses_N: Tensor, weight_N: Tensor) -> Check:
    mixed = torch.dot(losses_N, weight_N.to(losses_N))
    try:
        return Check(weight_N, torch.autograd.grad(mixed, problem.layout.params, retain_graph=True, allow_unused=True))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise Refusal(f"the losses of single examples cannot be differentiated: {error}") from error


def mixed(losses_N: Tensor) -> Tensor:
    """A weight of its own for each example (multiples of the golden ratio, modulo 1): exchanged examples show."""
    return (torch.arange(1, len(losses_N) + 1, device=losses_N.device) * 0.6180339887498949) % 1 + 0.5


def all_once(problem: SampleProblem, uses: Sequence[Use]) -> bool:
    return len({use.index for use in uses}) == len(uses) == len(problem.layout.params)


def remember_output(problem: SampleProblem, batch: Batch, plan: Plan, uses: Sequence[Use]) -> None:
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
        if len(outputs) != 1 or not isinstance(outputs[0], Tensor) or outputs[0].grad_fn is None or before.moved():
            return
        leaf = outputs[0].detach().requires_grad_()
        try:
            above = loss_graph(problem.objective.parts(lambda *args, **kwargs: leaf, batch), leaf)
        except Exception:  # a loss that asks more of `call` than to be called
            return
    there, graph, _ = find_uses(outputs[0].grad_fn, problem.layout.params)
    places = {(use.index, use.slot, use.name, use.shape): axis for use, axis in zip(uses, plan.axes, strict=True)}
    axes = [places.get((use.index, use.slot, use.name, use.shape)) for use in there]
    if len(there) == len(uses) and None not in axes:
        remember(problem.plans, output_key(problem.layout, graph), replace(plan, axes=tuple(axes), loss_graph=above))


def loss_graph(parts: Parts, leaf: Tensor) -> int:
    """Of the loss on an output of the model that was cut from its graph."""
    return find_uses(parts.total.grad_fn, (leaf,)).key


def remember(plans: dict[Any, Any], key: Any, plan: Plan) -> None:
    """The oldest goes where there are many: batches of any size, sequences of any length have a graph each."""
    if len(plans) >= MOST_PLANS:
        del plans[next(iter(plans))]
    plans[key] = plan
