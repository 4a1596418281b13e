"""The Jacobian of a model's outputs by its parameters at one point, known by its products from both sides.

A backward pass computes J' w and is linear in w, so differentiating it by w gives J v: the same graph serves both
products and no forward-mode rule is needed (Townsend 2017, "A new trick for calculating Jacobian vector products").
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class Jacobian:
    """J of `outputs` by `params`, on a graph that is kept: J v costs a good half of a gradient, J' u two thirds."""

    def __init__(self, outputs: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        self._outputs, self._params = outputs, params
        self._dummies = [torch.zeros_like(z, requires_grad=True) for z in outputs]
        pulled = pullback(outputs, params, self._dummies, create_graph=True)
        self._pulled = [g if g is None or g.layout is torch.strided else g.to_dense() for g in pulled]

    def jvp(self, v: Sequence[Tensor]) -> list[Tensor]:
        """J v, one tensor an output, for one tensor a parameter."""
        tangents = pullback(self._pulled, self._dummies, v)
        return [torch.zeros_like(w) if t is None else t for t, w in zip(tangents, self._dummies, strict=True)]

    def vjp(self, u: Sequence[Tensor | None]) -> list[Tensor | None]:
        """J' u, one tensor a parameter, for one tensor an output; None is zero on both sides."""
        return pullback(self._outputs, self._params, u)


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
