"""Finds, in the graph of a loss, the operations that use each parameter.

Modules are not asked: a parameter used by a function, tied to another module, or inside attention is found all the
same. Between parameter and operation may stand views (a transpose, a slice), whose own backward carries gradients on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from instruments.reentrant import REENTRANT, hidden_parameters
from instruments.samples.problem import Statistics

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


@dataclass(frozen=True)
class Use:
    """One operation that takes parameter `index` as its input number `slot`, through the views of `chain`.

    `chain` goes from the operation to the parameter; each entry is a node and which of its outputs is used.
    """

    index: int
    node: Node
    slot: int
    chain: tuple[tuple[Node, int], ...]
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return str(self.node.name())

    def to_parameter(self, gradient: Tensor) -> Tensor:
        """From the gradient of what the operation takes to that of the parameter: the backward of the views."""
        for node, output in self.chain:
            given: list[Tensor | None] = [None] * len(node._input_metadata)
            given[output] = gradient
            result: Any = node(*given)
            gradient = result[0] if isinstance(result, tuple) else result
        return gradient

    def from_parameter(self, direction: Tensor) -> Tensor:
        """A direction of the parameter as the operation sees it: the views themselves, as the adjoint of the above."""
        if all(node.name() == "TBackward0" for node, _ in self.chain):
            return direction.T if len(self.chain) % 2 else direction
        with torch.enable_grad():
            zero = torch.zeros(self.shape, dtype=direction.dtype, device=direction.device, requires_grad=True)
            moved = self.to_parameter(zero)
            return torch.autograd.grad(moved, zero, direction.reshape(moved.shape))[0]

    def rows_to_parameter(self, grads_n: Tensor) -> Tensor:
        """The same for n gradients at a time, flattened to rows of shape (n, d)."""
        moved: Tensor = torch.vmap(self.to_parameter)(grads_n) if self.chain else grads_n
        return moved.reshape(len(moved), -1)

    def statistics_to_parameter(self, found: Statistics) -> Statistics:
        """Views leave norms and products alone; the squares are carried to their places."""
        if found.squares_d is None:
            return found
        squares = self.to_parameter(found.squares_d.reshape(self.shape))
        return Statistics(found.norms_sq_N, squares, found.inner_N, found.gram_NN)


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
    names: list[tuple[str, object]] = []
    consumers: dict[Node, list[tuple[Node, int, int]]] = {}
    leaves: dict[int, Node] = {}
    custom, waiting = False, [root]
    consumers[root] = []
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            leaves[id(node.variable)] = node
            continue
        names.append((node.name(), [about.shape for about in node._input_metadata]))
        custom |= isinstance(node, torch.autograd.function.BackwardCFunction)
        for slot, (below, output) in enumerate(node.next_functions):
            if below is None:
                continue
            users = consumers.get(below)
            if users is None:
                consumers[below] = [(node, slot, output)]
                waiting.append(below)
            else:
                users.append((node, slot, output))
    kinds = {name for name, _ in names}
    if REENTRANT in kinds:
        raise hidden_parameters()
    reorders = custom or any(name.startswith(REORDERING) for name in kinds)
    uses: list[Use] = []
    for index, p in enumerate(params):
        leaf = leaves.get(id(p))
        if leaf is not None:
            _climb(index, leaf, (), tuple(p.shape), consumers, uses)
    chains = [(u.index, u.slot, u.name, u.shape, [(str(node.name()), out) for node, out in u.chain]) for u in uses]
    return Uses(uses, hash(repr((names, chains))), reorders)


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
        else:
            uses.append(Use(index, node, slot, chain, shape))
