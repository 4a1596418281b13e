"""Whole gradients of a few single examples of the step, one at a time.

With loss = total / denominator over N examples, example i has the gradient g_i = (N / denominator) grad(its sum), as in
`instruments.samples`. Engines there reduce what they compute and never show a row; here rows are what is wanted, and a
handful of them is read by a backward pass each, through the graph of the chosen examples alone.

Shapes: N = examples of one batch, K = chosen ones.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from instruments.objective import Batch, no_examples, plain_tree
from instruments.reentrant import refuse_reentrant
from instruments.refusal import Refusal
from instruments.samples.independence import check_at_rest, refuse_interaction, refuse_undefined, whole_batch
from instruments.samples.problem import SampleProblem

if TYPE_CHECKING:
    from instruments.probe import Probe

Seen = TypeVar("Seen")
Look = Callable[[list[Tensor]], Seen]


@dataclass(frozen=True)
class _Piece:
    """A batch that is run: `index_K` are its examples that are wanted, `losses_K` what their sums must be."""

    batch: Batch
    examples: int
    index_K: Tensor
    losses_K: Tensor | None


def look_at_examples(
    problem: SampleProblem, batches: Sequence[Batch], count: int, look: Look[Seen]
) -> tuple[list[Seen], float]:
    """What `look` says of the gradient of every s-th example, at most `count` of them, and the price in g.

    A gradient is one tensor a parameter that the losses depend on. Where a batch can be cut, the chosen
    examples are run as a batch of their own, whose losses must be those of the whole; if random numbers are drawn, they
    are drawn anew for it. Raises Refusal where an example has no gradient of its own.
    """
    refuse_undefined(problem.module)
    wholes = [whole_batch(problem, batch) for batch in batches]
    n = sum(len(sums_N) for sums_N, _, _ in wholes)
    unit = n / sum((denominator for _, denominator, _ in wholes), start=0.0)
    stride, before, price = math.ceil(n / count), 0, 1 / 3
    seen: list[Seen] = []
    for batch, (sums_N, _, random) in zip(batches, wholes, strict=True):
        index_K = torch.arange(-before % stride, len(sums_N), stride, device=sums_N.device)
        before += len(sums_N)
        if len(index_K):
            piece = _cut(problem, batch, sums_N, index_K, random=random)
            seen += _look(problem, piece, unit, look)
            price += piece.examples / n * (1 + 2 * len(index_K)) / 3 + random * 2 / 3 * len(sums_N) / n
    return seen, price


def of_probe(probe: "Probe", count: int, look: Look[Seen]) -> tuple[list[Seen], float]:
    """The same for the batches of a step, under its seed."""

    def pinned(*, differentiable: bool = False) -> AbstractContextManager[None]:
        return probe.running(held=False, differentiable=differentiable)

    probe.prepare()
    graphs = probe.plans.setdefault("graphs", {})
    problem = SampleProblem(probe.module, probe.layout, probe.objective, pinned, plans=graphs)
    return look_at_examples(problem, probe.batches, count, look)


def usual_price(examples: int, count: int) -> float:
    """In g, for a batch that can be cut."""
    count = min(count, examples)
    return 1 / 3 + count / examples * (1 + 2 * count) / 3


def _cut(problem: SampleProblem, batch: Batch, sums_N: Tensor, index_K: Tensor, *, random: bool) -> _Piece:
    """The chosen examples alone, or the whole batch where it cannot be cut."""
    leaves, spec = tree_flatten(plain_tree(batch))
    n = len(sums_N)
    if not all(isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == n for leaf in leaves):
        return _Piece(batch, n, index_K, None)
    if random:
        check_at_rest(problem, batch)
    some = tree_unflatten([leaf[index_K.to(leaf.device)] for leaf in leaves], spec)
    return _Piece(some, len(index_K), torch.arange(len(index_K)), None if random else sums_N[index_K])


def _look(problem: SampleProblem, piece: _Piece, unit: Tensor | float, look: Look[Seen]) -> list[Seen]:
    seen = []
    with torch.enable_grad(), problem.running():
        parts = problem.objective.parts(problem.module, piece.batch)
        if parts.sums_N is None:
            raise no_examples()
        refuse_reentrant(parts.total)
        if piece.losses_K is not None:
            refuse_interaction(parts.sums_N.detach(), piece.losses_K)
        for k in piece.index_K.tolist():
            grads = _present(parts.sums_N[k], problem.layout.params)
            with torch.no_grad():
                seen.append(look([g * unit for g in grads]))
    return seen


def _present(loss: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of those parameters that the loss depends on."""
    grads: Sequence[Tensor | None] = ()
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
    present = [g for g in grads if g is not None]
    if not present:
        raise Refusal("the loss does not depend on any trained parameter.")
    return present
