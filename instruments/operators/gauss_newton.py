"""The generalised Gauss-Newton matrix of a mean loss: its Hessian without the curvature of the model.

With outputs z = f(theta) and total loss L = sum_b total_b(z_b) / sum_b weight_b,

    G = sum_b J_b' H_b J_b / sum_b weight_b,      J_b = dz_b/dtheta,      H_b = d^2 total_b / dz_b^2.

G has no negative eigenvalue where the loss is convex in z (cross-entropy, squared error, binary cross-entropy), equals
the Hessian where the model is linear or the residuals vanish, and needs no second derivative of the forward pass.
What counts as z is what the loss sees: the tensors that `call` returns. (Schraudolph 2002, "Fast curvature
matrix-vector products for second-order gradient descent"; Martens 2020, "New insights and perspectives on the natural
gradient method", section 8.)

The loss is evaluated on detached copies of the outputs, so that its graph ends there: H_b is the double backward of
that graph, J_b is the model's alone.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from instruments.layout import Layout
from instruments.objective import Call
from instruments.operators.hessian import Context
from instruments.operators.jacobian import Jacobian, pullback
from instruments.operators.operator import Operator, released
from instruments.refusal import Refusal

Evaluation = Callable[[Call], tuple[Tensor, Tensor | float]]
"""Evaluates one batch through a given forward of the model: (total loss with a graph, weight without one)."""
Products = Literal["kept", "rebuilt", "forward"]

# In g, by floating-point operations: 1.3, 2.3 and 1.7 on dense and attention layers; 2.1, 3.1 and 1.7 on convolutions.
PRICES: dict[Products, float] = {"kept": 1.6, "rebuilt": 2.6, "forward": 1.7}
ROUTES: dict[Products, str] = {
    "kept": "Gauss-Newton, backward passes on a kept graph",
    "rebuilt": "Gauss-Newton, backward passes on a graph rebuilt for each product",
    "forward": "Gauss-Newton, forward mode and one backward pass for each product",
}

DIFFERENTIATES = (
    "the loss differentiates what the model returns by its input (a gradient penalty, a physics-informed loss, score "
    "matching), so it depends on more of the model than that and has no Gauss-Newton matrix; read the Hessian, "
    'matrix="hessian".'
)


class GaussNewtonOperator(Operator):
    """G of the weighted mean of `pieces`, over the parameters of `layout`.

    `products="kept"` holds the graph of a backward pass between products (memory of two to three gradients);
    "forward" holds nothing and asks for a forward-mode rule of every operation; "rebuilt" holds nothing and asks for
    none, at a higher price. A loss that calls the model several times on inputs that do not depend on its outputs has
    the outputs of all calls as z. Raises Refusal where z cannot be told apart from the loss: a call on the output of
    another, or a loss that reaches parameters other than through the tensors that `call` returns.

    Call `release()` before the optimizer steps: the graphs hold the parameters at their present version.
    """

    def __init__(
        self,
        module: nn.Module,
        pieces: Sequence[Evaluation],
        layout: Layout,
        *,
        products: Products = "kept",
        context: Context = lambda forward: nullcontext(),
    ) -> None:
        if products not in get_args(Products):
            known = ", ".join(get_args(Products))
            raise ValueError(f"expected products to be one of {known}, got {products!r}.")
        if products == "forward":
            _refuse_sparse(module)
        self._module, self._pieces, self._layout, self._context = module, pieces, layout, context
        self.size, self.dtype, self.device = layout.size, layout.dtype, layout.device
        self.weight: Tensor | float = 0.0  # of all batches, once a product was taken
        self.price, self.route, self._products = PRICES[products], ROUTES[products], products
        self._graphs = [self._graph(piece) for piece in pieces] if products == "kept" else None

    @property
    def gradient_D(self) -> Tensor:
        """Gradient of the same loss, shape (D,): one backward pass where the graph is kept, else a gradient."""
        return self._weighted(lambda piece, graph: (graph or self._graph(piece)).gradient())

    def matvec(self, v_D: Tensor) -> Tensor:
        v = self._layout.split(v_D)
        if self._products == "forward":
            return self._weighted(lambda piece, _: self._forward_product(piece, v))
        return self._weighted(lambda piece, graph: (graph or self._graph(piece)).product(v))

    def release(self) -> None:
        """Free the graphs; the operator cannot be used afterwards."""
        self._graphs, self._pieces = None, []

    def _weighted(self, of: "Callable[[Evaluation, _Graph | None], _Share]") -> Tensor:
        if not self._pieces:
            raise released()
        total_D = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        weight: Tensor | float = 0.0
        graphs: Sequence[_Graph | None] = self._graphs or [None] * len(self._pieces)
        with self._context(False):
            for piece, graph in zip(self._pieces, graphs, strict=True):
                share, its_weight = of(piece, graph)
                total_D += self._layout.join(share)
                weight = weight + its_weight
        self.weight = weight
        return total_D / weight

    def _graph(self, piece: Evaluation) -> "_Graph":
        with self._context(True), torch.enable_grad():
            cut = _Cut(self._module)
            loss = _split(piece, cut, self._layout)
            graph = _Graph(Jacobian(cut.outputs, self._layout.params), loss)
        self._refuse_more(piece, cut, loss)
        return graph

    def _forward_product(self, piece: Evaluation, v: Sequence[Tensor]) -> "_Share":
        """One dual forward gives z, its graph and J v; one backward pass then J' H J v."""
        with self._context(True), torch.enable_grad():
            dual = _Dual(self._module, self._layout, v)
            cut = _Cut(dual)
            loss = _split(piece, cut, self._layout)
            share = pullback(cut.outputs, self._layout.params, loss.product(dual.tangents)), loss.weight
        self._refuse_more(piece, cut, loss)
        return share

    def _refuse_more(self, piece: Evaluation, cut: "_Cut", loss: "_OutputLoss") -> None:
        """Where the inputs ask for gradients the loss may contain those of the model, which the cut makes zero: then it
        is another number with the model itself, under the same random numbers."""
        if not cut.by_inputs:
            return
        with self._context(True), torch.enable_grad():
            whole, _ = piece(self._module)
        if not torch.allclose(whole.detach(), loss.total, rtol=1e-5, equal_nan=True):
            raise Refusal(DIFFERENTIATES)


_Share = tuple[Sequence[Tensor | None], Tensor | float]
"""What one batch adds to a product, one tensor a parameter, and its weight."""


@dataclass
class _Cut:
    """The model's forward, except that the loss gets copies of its outputs which no gradient passes through."""

    forward: Call
    outputs: list[Tensor] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)
    calls: int = 0
    by_inputs: bool = False  # an input asks for a gradient

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.by_inputs |= any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves((args, kwargs)))
        return tree_map(self._copy, self.forward(*args, **kwargs))

    def _copy(self, leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.requires_grad):
            return leaf
        if leaf.is_complex():
            raise Refusal("the model returns complex numbers, whose Gauss-Newton matrix is not supported.")
        self.outputs.append(leaf)
        self.leaves.append(leaf.detach().requires_grad_())
        return self.leaves[-1].clone()  # a loss may overwrite what it is given


class _Dual:
    """The model's forward at the parameters, carrying the direction v along: `tangents` collects J v output by output.

    What it returns has a graph to the parameters as usual, and no tangent.
    """

    def __init__(self, module: nn.Module, layout: Layout, v: Sequence[Tensor]) -> None:
        self._module, self._directions = module, list(zip(layout.names, layout.params, v, strict=True))
        self.tangents: list[Tensor] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            with forward_ad.dual_level():
                duals = {name: _dual(p, t) for name, p, t in self._directions}
                return tree_map(self._primal, functional_call(self._module, duals, args, kwargs))
        except NotImplementedError as error:
            raise Refusal(f'no forward-mode rule, use products="kept" or "rebuilt": {error}') from error

    def _primal(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        primal, tangent = forward_ad.unpack_dual(leaf)  # type: ignore[no-untyped-call]
        if primal.requires_grad:
            self.tangents.append(torch.zeros_like(primal) if tangent is None else tangent.detach())
        return primal


def _refuse_sparse(module: nn.Module) -> None:
    for name, m in module.named_modules():
        if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse:
            raise Refusal(
                f"{type(m).__name__} '{name}' has sparse gradients, which forward mode cannot pass back; "
                'use products="kept" or "rebuilt".'
            )


def _dual(p: Tensor, direction: Tensor) -> Tensor:
    dual: Tensor = forward_ad.make_dual(p, direction)  # type: ignore[no-untyped-call]
    return dual


@dataclass(frozen=True)
class _OutputLoss:
    """The loss as a function of the outputs: its value, and its gradient by them, which can be differentiated again."""

    total: Tensor
    leaves: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    weight: Tensor | float

    def product(self, u: Sequence[Tensor]) -> list[Tensor | None]:
        return pullback(self.grads, self.leaves, u)


@dataclass(frozen=True)
class _Graph:
    jacobian: Jacobian
    loss: _OutputLoss

    def gradient(self) -> _Share:
        u = [None if g is None else g.detach() for g in self.loss.grads]
        return self.jacobian.vjp(u), self.loss.weight

    def product(self, v: Sequence[Tensor]) -> _Share:
        return self.jacobian.vjp(self.loss.product(self.jacobian.jvp(v))), self.loss.weight


def _split(piece: Evaluation, cut: _Cut, layout: Layout) -> _OutputLoss:
    """Evaluate the loss through the cut, and make sure that nothing but the outputs connects it to the parameters."""
    try:
        total, weight = piece(cut)
    except AttributeError as error:
        if error.obj is not cut:
            raise
        raise Refusal(
            f"the loss uses '{error.name}' of the model besides calling it, so what it sees of the model is not known; "
            "use the Hessian, or a loss that only calls."
        ) from error
    except RuntimeError as error:
        if "not have been used in the graph" not in str(error):
            raise
        raise Refusal(DIFFERENTIATES) from error
    _refuse_bypass(total, layout)
    if cut.calls > 1:
        _refuse_chain(cut)
    ones = torch.ones_like(total)
    grads = pullback([total], cut.leaves, [ones], create_graph=True)
    return _OutputLoss(total.detach(), cut.leaves, grads, weight)


def _refuse_bypass(total: Tensor, layout: Layout) -> None:
    reached = pullback([total], layout.params, [torch.ones_like(total)])
    for name, g in zip(layout.names, reached, strict=True):
        if g is not None:
            raise Refusal(
                f"the loss reaches parameter '{name}' other than through the tensors that the model returns (a penalty "
                "on parameters, a model held by the loss function, an output object that torch cannot look into), so "
                "it has no Gauss-Newton matrix; use the Hessian."
            )


def _refuse_chain(cut: _Cut) -> None:
    """Outputs of one call must not depend on copies of the outputs of another."""
    chained = pullback(cut.outputs, cut.leaves, [torch.ones_like(z) for z in cut.outputs])
    if any(g is not None for g in chained):
        raise Refusal(
            "the loss calls the model on what another call returned, so there is no single output to linearise at; "
            "use the Hessian, or a module that makes these calls in its own forward."
        )
