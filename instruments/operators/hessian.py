"""The Hessian of a mean loss over one or several batches, by double backward.

With total loss L = sum_b total_b / sum_b weight_b, the product is

    H v = sum_b d/dtheta ( grad total_b . v ) / sum_b weight_b.

Kept graphs: each gradient graph is built once (1 g) and each product costs about 2 g. Rebuilt graphs: nothing is held
between products and each costs about 3 g. (Pearlmutter 1994, "Fast exact multiplication by the Hessian".)
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from instruments.layout import Layout
from instruments.operators.operator import Operator, released
from instruments.operators.suspects import Suspects, suspects
from instruments.reentrant import gradients

Piece = Callable[[], tuple[Tensor, Tensor | float]]
"""Evaluates one batch: (total loss with a graph, weight without one)."""
Context = Callable[[bool], AbstractContextManager[None]]
"""What surrounds a forward (True) and a backward through an old graph (False), where checkpoints run forwards again."""

# In g, by floating-point operations on dense, convolution and attention layers.
KEPT_PRODUCT = 2.0
REBUILT_PRODUCT = 3.0


class HessianOperator(Operator):
    """H of the weighted mean of `pieces`, over the parameters of `layout`.

    Parameters that the loss does not reach, or reaches only linearly, have rows of zeros. `gradient_D`, the gradient of
    the same loss, comes free with the first graph. Call `release()` before the optimizer steps: the graphs hold the
    parameters at their present version.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        layout: Layout,
        *,
        keep_graphs: bool = True,
        context: Context = lambda forward: nullcontext(),
    ) -> None:
        self._pieces, self._layout, self._context = pieces, layout, context
        self._graphs: list[_Graph] | None = None
        self.weight: Tensor | float = 0.0  # of all batches, once a product was taken
        self.size, self.dtype, self.device = layout.size, layout.dtype, layout.device
        self.price = KEPT_PRODUCT if keep_graphs else REBUILT_PRODUCT
        self.route = f"double backward, graph {'kept' if keep_graphs else 'rebuilt for each product'}"
        if keep_graphs:
            self._graphs = [self._graph(piece) for piece in pieces]

    @property
    def gradient_D(self) -> Tensor:
        """Gradient of the same loss, shape (D,)."""
        return self._weighted(lambda graph: graph.gradient())

    @property
    def suspects(self) -> Suspects:
        """What may spoil the products, by the graph of the first batch."""
        graph = self._graphs[0] if self._graphs else self._graph(self._pieces[0])
        return graph.suspects

    def matvec(self, v_D: Tensor) -> Tensor:
        v = self._layout.split(v_D)
        with self._context(False):
            return self._weighted(lambda graph: graph.product(v))

    def release(self) -> None:
        """Free the graphs; the operator cannot be used afterwards."""
        self._graphs, self._pieces = None, []

    def _graph(self, piece: Piece) -> "_Graph":
        with self._context(True):
            return _Graph(piece, self._layout)

    def _weighted(self, of: Callable[["_Graph"], list[Tensor | None]]) -> Tensor:
        if not self._pieces:
            raise released()
        total_D = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        weight: Tensor | float = 0.0
        for i in range(len(self._pieces)):
            graph = self._graphs[i] if self._graphs is not None else self._graph(self._pieces[i])
            total_D += self._layout.join(of(graph))
            weight = weight + graph.weight
        self.weight = weight
        return total_D / weight


class _Graph:
    """The gradient of one batch's total loss, ready to be differentiated again."""

    def __init__(self, piece: Piece, layout: Layout) -> None:
        self._params = layout.params
        with torch.enable_grad():
            total, self.weight = piece()
            self.suspects = suspects([total], self._params)
            self._grads: list[Tensor | None] = [None] * len(self._params)
            if total.requires_grad:
                grads = gradients(total, self._params, create_graph=True)
                self._grads = [g if g is None or g.layout is torch.strided else g.to_dense() for g in grads]

    def gradient(self) -> list[Tensor | None]:
        return [None if g is None else g.detach() for g in self._grads]

    def product(self, v: Sequence[Tensor]) -> list[Tensor | None]:
        pairs = [(g, w) for g, w in zip(self._grads, v, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return [None] * len(self._params)
        outputs, vectors = zip(*pairs, strict=True)
        return list(
            torch.autograd.grad(outputs, self._params, grad_outputs=vectors, retain_graph=True, allow_unused=True)
        )
