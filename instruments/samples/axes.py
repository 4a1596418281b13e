"""Where the examples are in a tensor, found from which of its elements the loss of one example depends on.

A layer sees the batch in any layout: examples first, sequence first, examples and positions merged into one dimension.
The gradient of example k's loss is zero in the rows of all others, so the pattern of its zeros says which.

Shapes: N = examples of one batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExampleAxis:
    """The examples are the middle factor of dimension `dim` of size outer * N * inner, the last index fastest."""

    dim: int
    examples: int
    inner: int

    def first(self, t: Tensor) -> Tensor:
        """The tensor with the examples as its first dimension, (N, rest); a view where strides allow."""
        if self.dim == 0 and t.shape[0] == self.examples:
            return t.reshape(self.examples, 1, 1, *t.shape[1:])
        outer = t.shape[self.dim] // (self.examples * self.inner)
        parts = (outer, self.examples, self.inner)
        split = t.reshape(*t.shape[: self.dim], *parts, *t.shape[self.dim + 1 :])
        return split.movedim(self.dim + 1, 0)

    def merged(self, t: Tensor, kept: int) -> Tensor:
        """(N, T, last dimensions): all but the last `kept` dimensions, examples apart, in one dimension of positions.

        Two tensors that share their leading dimensions get the same order of positions.
        """
        if self.dim == 0 and t.shape[0] == self.examples * self.inner and t.ndim == kept + 1:
            return t.reshape(self.examples, self.inner, *t.shape[1:])
        t = self.first(t)
        tail = t.shape[t.ndim - kept :]
        return t.reshape(self.examples, prod(t.shape[1 : t.ndim - kept]), *tail)


Profile = dict[int, Tensor]


def profile(delta: Tensor, examples: int) -> Profile:
    """By dimension that could hold the examples: at which of its indices anything is not zero (NaN is not zero)."""
    touched = torch.ne(delta, 0)
    dims = range(delta.ndim)
    return {
        dim: touched.any(dim=[d for d in dims if d != dim]) if delta.ndim > 1 else touched
        for dim in dims
        if delta.shape[dim] % examples == 0 and delta.shape[dim]
    }


def find_axes(seen: Sequence[tuple[int, Profile]], examples: int) -> Iterator[ExampleAxis]:
    """The layouts in which all that the loss of example k touched lies in the slice of k, for each (k, profile).

    Dimensions are tried in order, and in each the layout with examples outermost first. Several fit where too little
    was touched: gradients that are zero (a gate that starts at zero, masked positions) fit any.
    """
    for dim in seen[0][1] if seen else ():
        for inner in _divisors(len(seen[0][1][dim]) // examples):
            axis = ExampleAxis(dim, examples, inner)
            if all(_only(axis, found[dim], k) for k, found in seen):
                yield axis


def _only(axis: ExampleAxis, touched: Tensor, k: int) -> bool:
    touched_N = touched.reshape(-1, axis.examples, axis.inner).any(2).any(0)
    touched_N[k] = False
    return not bool(touched_N.any())


def _divisors(n: int) -> Iterator[int]:
    """Divisors of n, the largest first."""
    return (d for d in range(n, 0, -1) if n % d == 0)
