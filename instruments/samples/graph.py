"""Finds, in the graph of a loss, the operations that use each parameter.

Modules are not asked: a parameter used by a function, tied to another module, or inside attention is found all the
same. Between parameter and operation may stand views (a transpose, a slice), whose own backward carries gradients on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from instruments.reentrant import REENTRANT, hidden_parameters
from instruments.samples.problem import Statistics, flat_rows

Node = Any  # torch.autograd.graph.Node, whose saved tensors are attributes that its class does not declare

VIEWS = frozenset(
    name + "Backward" + version
    for name in (
        "T", "View", "UnsafeView", "ReshapeAlias", "Transpose", "Permute", "Unsqueeze", "Squeeze", "Slice", "Select",
        "Split", "SplitWithSizes", "Unbind", "Clone", "Alias",
    )
    for version in ("0", "1", "2")
)  # fmt: skip
"""Operations that only rearrange or drop elements: norms and inner products of gradients pass through them."""


PRODUCTS = ("AddmmBackward0", "MmBackward0")
"""Products of two matrices."""


@dataclass(frozen=True)
class Use:
    """One operation that takes parameter `index` as its input number `slot`, through the views of `chain`.

    `chain` goes from the operation to the parameter; each entry is a node and which of its outputs is used. `shape` is
    that of what the operation takes. Where `flipped`, a matrix product takes the transpose of that, which is no part of
    the chain: the rules give what they find in the other order, so that nothing of the size of a weight is turned.
    """

    index: int
    node: Node
    slot: int
    chain: tuple[tuple[Node, int], ...]
    shape: tuple[int, ...]
    flipped: bool = False

    @cached_property
    def name(self) -> str:
        return str(self.node.name())

    def to_parameter(self, gradient: Tensor) -> Tensor:
        """From the gradient of what the operation takes to that of the parameter: the backward of the views, which
        cannot be asked while a backward pass runs that does not go through them."""
        for node, output in self.chain:
            given: list[Tensor | None] = [None] * len(node._input_metadata)
            given[output] = gradient
            result: Any = node(*given)
            gradient = result[0] if isinstance(result, tuple) else result
        return gradient

    def from_parameter(self, direction: Tensor) -> Tensor:
        """A direction of the parameter as the operation sees it: the views themselves, as the adjoint of the above."""
        if not self.chain:
            return direction
        with torch.enable_grad():
            zero = torch.zeros(self.shape, dtype=direction.dtype, device=direction.device, requires_grad=True)
            moved = self.to_parameter(zero)
            return torch.autograd.grad(moved, zero, direction.reshape(moved.shape))[0]

    def rows_to_parameter(self, grads_n: Tensor) -> Tensor:
        """The same for n gradients at a time, flattened to rows of shape (n, d)."""
        moved: Tensor = torch.vmap(self.to_parameter)(grads_n) if self.chain else grads_n
        return flat_rows(moved)

    def statistics_to_parameter(self, found: Statistics) -> Statistics:
        """Views leave norms and products alone; the squares are carried to their places."""
        if found.squares_d is None:
            return found
        squares = self.to_parameter(found.squares_d.reshape(self.shape))
        return replace(found, squares_d=squares)


REORDERING = ("Index", "Gather", "Scatter", "Take", "Sort", "Topk", "MaskedS", "PackPadded", "Roll", "Flip")
"""Beginnings of the names of operations that may move examples to other places, differently at every batch."""


class Uses(NamedTuple):
    """The uses of all parameters; `key` tells graphs apart; `reorders`: examples may change places between layers."""

    all: list[Use]
    key: int
    reorders: bool


def find_uses(root: Node, params: Sequence[Tensor]) -> Uses:
    """Every use of every parameter below `root`, by one walk over the graph.

    Raises Refusal where a reentrant checkpoint hides parameters.
    """
    names: list[str] = []
    shapes: list[tuple[tuple[int, ...], ...]] = []
    consumers: dict[Node, list[tuple[Node, int, int]]] = {}
    leaves: dict[int, Node] = {}
    custom, waiting = False, [root]
    consumers[root] = []
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            leaves[id(node.variable)] = node
            continue
        name = node.name()
        names.append(
            f"{name} {node._saved_training}" if "BatchNorm" in name and hasattr(node, "_saved_training") else name
        )
        shapes.append(tuple([tuple(about.shape) for about in node._input_metadata]))
        custom = custom or isinstance(node, torch.autograd.function.BackwardCFunction)
        for slot, (below, output) in enumerate(node.next_functions):
            if below is None:
                continue
            users = consumers.get(below)
            if users is None:
                consumers[below] = [(node, slot, output)]
                waiting.append(below)
            else:
                users.append((node, slot, output))
    kinds = set(names)
    if REENTRANT in kinds:
        raise hidden_parameters()
    reorders = custom or any(name.startswith(REORDERING) for name in kinds)
    uses: list[Use] = []
    for index, p in enumerate(params):
        leaf = leaves.get(id(p))
        if leaf is not None:
            _climb(index, leaf, (), tuple(p.shape), consumers, uses)
    chains = tuple(
        (u.index, u.slot, u.name, u.flipped, u.shape, tuple((n.name(), out) for n, out in u.chain)) for u in uses
    )
    return Uses(uses, hash((tuple(names), tuple(shapes), chains)), reorders)


def _climb(
    index: int,
    below: Node,
    chain: tuple[tuple[Node, int], ...],
    shape: tuple[int, ...],
    consumers: dict[Node, list[tuple[Node, int, int]]],
    uses: list[Use],
    wanted: int = 0,
) -> None:
    """Follow a parameter upwards through views to the operations that use it."""
    for node, slot, output in consumers.get(below, ()):
        if output != wanted:
            continue
        if node.name() in VIEWS:
            for out, about in enumerate(node._input_metadata):
                _climb(index, node, ((node, out), *chain), tuple(about.shape), consumers, uses, out)
            continue
        flipped = bool(chain) and node.name() in PRODUCTS and chain[0][0].name() == "TBackward0"
        if flipped:
            uses.append(Use(index, node, slot, chain[1:], shape[::-1], True))
        else:
            uses.append(Use(index, node, slot, chain, shape))


def deepest(uses: Sequence[Use]) -> tuple[int, ...]:
    """The numbers of those uses below whose operation no other one uses a parameter: a backward pass that reaches all
    of them has passed all the others."""
    nodes = {use.node for use in uses}
    above: dict[Node, bool] = {}

    def uses_below(start: Node) -> bool:
        """Whether any operation in `nodes` is below; without recursion, as graphs are as deep as models."""
        waiting = [start]
        while waiting:
            node = waiting[-1]
            below = [n for n, _ in node.next_functions if n is not None]
            unknown = [n for n in below if n not in above]
            if unknown:
                waiting += unknown
                continue
            above[node] = any(n in nodes or above[n] for n in below)
            waiting.pop()
        return above[start]

    return tuple(number for number, use in enumerate(uses) if not uses_below(use.node))
