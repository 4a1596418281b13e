"""The Jacobian of a model's outputs by its parameters at one point, known by its products from both sides.

A backward pass computes J' w and is linear in w, so differentiating it by w gives J v: the same graph serves both
products and no forward-mode rule is needed (Townsend 2017, "A new trick for calculating Jacobian vector products").
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from instruments.operators.suspects import hooked_beyond_masks, suspects
from instruments.reentrant import nothing_hidden, refuse_reentrant
from instruments.refusal import Refusal

MISSING = "not implemented", "differentiate twice"
"""Words of PyTorch where a backward has no derivative."""
MISMATCH, ROUNDING = 0.02, 16.0
"""Of |u'(Jv) - (J'u)'v| against |Jv| |u| / sqrt(size of u); `ROUNDING` counts units in the last place."""


class Jacobian:
    """J of `outputs` by `params`, on a graph that is kept: J v costs a good half of a gradient, J' u two thirds.

    Raises Refusal where the graph hides parameters, where a backward has no derivative, where an autograd.Function of
    the user's makes the two products those of different matrices, and where a hook on a parameter is more than a mask.
    """

    def __init__(self, outputs: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        self._outputs, self._params = outputs, params
        self._dummies = [torch.zeros_like(z, requires_grad=True) for z in outputs]
        if hooked_beyond_masks(params):
            raise Refusal(
                "expected hooks on parameters that are masks, got one that scales or limits the gradient: products "
                'would meet it twice; the Hessian is read by differences there (matrix="hessian").'
            )
        for z in outputs:
            refuse_reentrant(z)
        with nothing_hidden(params):
            pulled = pullback(outputs, params, self._dummies, create_graph=True)
        self._pulled = [g if g is None or g.layout is torch.strided else g.to_dense() for g in pulled]
        found = suspects(outputs, params)
        if found.opaque:
            self._check(MISMATCH + ROUNDING * torch.finfo(found.precision).eps)

    def jvp(self, v: Sequence[Tensor]) -> list[Tensor]:
        """J v, one tensor an output, for one tensor a parameter."""
        try:
            tangents = pullback(self._pulled, self._dummies, v)
        except RuntimeError as error:
            if not any(words in str(error) for words in MISSING):
                raise
            raise Refusal(
                "this matrix needs the derivative of a backward pass, which one operation does not have "
                f"({str(error).strip().splitlines()[0][:120]}); the Hessian is read by differences there "
                '(matrix="hessian").'
            ) from error
        return [torch.zeros_like(w) if t is None else t for t, w in zip(tangents, self._dummies, strict=True)]

    def vjp(self, u: Sequence[Tensor | None]) -> list[Tensor | None]:
        """J' u, one tensor a parameter, for one tensor an output; None is zero on both sides."""
        return pullback(self._outputs, self._params, u)

    def _check(self, allowed: float) -> None:
        """u'(Jv) = (J'u)'v, for random u and v: a derivative that is missing is missing on one side alone."""
        u, v = _random(self._outputs, 0), _random(self._params, 1)
        image = self.jvp(v)
        left, right = _dot(image, u), _dot(self.vjp(u), v)
        if bool((left - right).abs() > allowed * _dot(image, image).sqrt()):
            raise Refusal(
                "expected a backward pass that can be differentiated, got an autograd.Function with which products "
                'from both sides disagree; the Hessian is read by differences there (matrix="hessian").'
            )


def pullback(
    outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    vectors: Sequence[Tensor | None],
    *,
    create_graph: bool = False,
) -> list[Tensor | None]:
    """sum_k (d outputs_k / d inputs)' vectors_k, None where an input is not reached; the graph stays."""
    triples = zip(outputs, vectors, strict=True)
    pairs = [(z, u) for z, u in triples if z is not None and u is not None and z.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    reached, weights = zip(*pairs, strict=True)
    return list(
        torch.autograd.grad(
            reached, inputs, grad_outputs=weights, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
    )


def _random(tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Standard normal, in the shape and type of each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=generator).to(t) for t in tensors]


def _dot(one: Sequence[Tensor | None], other: Sequence[Tensor]) -> Tensor:
    """Sum of the products of all elements, in float64; None is zero."""
    total = torch.zeros((), dtype=torch.float64, device=other[0].device)
    for a, b in zip(one, other, strict=True):
        if a is not None:
            dense = a if a.layout is torch.strided else a.to_dense()
            total = total + (dense.double() * b.double()).sum().to(total.device)
    return total
