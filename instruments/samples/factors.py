"""Per-example gradients of one parameter in the form that an operation leaves them, and their statistics.

A gradient of a weight that is used at T positions is a product of two thin matrices (`outer`); one of an embedding has
a few rows. What can be had from the factors is not computed from the gradient, which is formed in blocks only.

Shapes: N = examples, n = some of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from instruments.samples.graph import Use
from instruments.samples.problem import Statistics, Wants, flat_rows

BLOCK_SCALARS = {"cpu": 2**17}
"""Scalars of gradients formed at a time: on a CPU what its caches hold, two to three times faster than more."""
LARGE_BLOCK = 2**23


class Factor(ABC):
    """Abstract: the per-example gradients of one use of a parameter, in the shape in which the operation takes it."""

    @abstractmethod
    def statistics(self, wants: Wants, direction: Tensor | None) -> Statistics:
        """Norms and what is wanted beside them; inner products are with `direction`, in the operation's shape."""

    @abstractmethod
    def rows(self, some: slice) -> Tensor:
        """The gradients of some examples as they are, (n, *shape)."""

    @abstractmethod
    def along(self, direction: Tensor) -> Tensor:
        """(N,): <g_i, direction> alone, without the gradients."""

    def formed(self) -> "Factor":
        """For who reads it more than once: as gradients, where each reading forms them and they are hardly larger."""
        return self

    def sketch(self, whole: Tensor) -> tuple[Tensor, Tensor] | None:
        """Two vectors that are equal where the gradients of all examples add up to `whole`, and otherwise differ with
        certainty, but for rounding: both multiplied by the same fixed random unit vector (Freivalds 1977). A few
        products of a matrix with a vector; None where it cannot be had so."""
        return None

    @property
    def bytes(self) -> int:
        """What the factor holds."""
        return sum(t.numel() * t.element_size() for t in vars(self).values() if isinstance(t, Tensor))

    def kept(self, storages: Collection[int]) -> "Factor":
        """Without the graph that its tensors come from; copies of those that lie in one of these storages, which will
        be written to, or in a storage much larger than they are, which would be held with them."""

        def own(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            spread = storage.nbytes() > 2 * t.numel() * t.element_size()
            return t.detach().clone() if spread or storage.data_ptr() in storages else t.detach()

        tensors = {name: own(t) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **tensors)  # type: ignore[type-var]


@dataclass(frozen=True)
class Direct(Factor):
    """Small parameters (biases, scales): the gradients themselves, (N, *shape)."""

    grads: Tensor

    def statistics(self, wants: Wants, direction: Tensor | None) -> Statistics:
        g_Nd = flat_rows(self.grads)
        squares_Nd = g_Nd.square()
        return Statistics(
            squares_Nd.sum(1),
            squares_Nd.sum(0) if "second_moment" in wants else None,
            None if direction is None else g_Nd @ direction.reshape(-1).to(g_Nd.dtype),
            g_Nd @ g_Nd.T if "gram" in wants else None,
        )

    def rows(self, some: slice) -> Tensor:
        return self.grads[some]

    def along(self, direction: Tensor) -> Tensor:
        return flat_rows(self.grads) @ direction.reshape(-1).to(self.grads.dtype)

    def sketch(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        return self.grads.sum(0).reshape(-1), whole.reshape(-1).to(self.grads.dtype)


@dataclass(frozen=True)
class Lookup(Factor):
    """Rows of a table, (V, q): entry u belongs to `example_U`, adds `grads_Uq` to row `row_U` of its gradient."""

    example_U: Tensor
    row_U: Tensor
    grads_Uq: Tensor
    examples: int
    shape: tuple[int, ...]

    def rows(self, some: slice) -> Tensor:
        first, last, _ = some.indices(self.examples)
        mine_U = (self.example_U >= first) & (self.example_U < last)
        place_U = (self.example_U[mine_U] - first) * self.shape[0] + self.row_U[mine_U]
        flat = self.grads_Uq.new_zeros((last - first) * self.shape[0], self.shape[1])
        return flat.index_add_(0, place_U, self.grads_Uq[mine_U]).reshape(last - first, *self.shape)

    def along(self, direction: Tensor) -> Tensor:
        v_Uq = direction.reshape(self.shape)[self.row_U].to(self.grads_Uq)
        return self.grads_Uq.new_zeros(self.examples).index_add_(0, self.example_U, (self.grads_Uq * v_Uq).sum(1))

    def sketch(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        r_q = unit_normal(self.shape[1], self.grads_Uq)
        sum_V = r_q.new_zeros(self.shape[0]).index_add_(0, self.row_U, self.grads_Uq @ r_q)
        return sum_V, whole.reshape(self.shape).to(r_q.dtype) @ r_q

    def statistics(self, wants: Wants, direction: Tensor | None) -> Statistics:
        pair_U, place_U = torch.unique(self.example_U * self.shape[0] + self.row_U, return_inverse=True)
        example_U, row_U = pair_U // self.shape[0], pair_U % self.shape[0]
        g_Uq = self.grads_Uq.new_zeros(len(pair_U), self.shape[1]).index_add_(0, place_U, self.grads_Uq)
        squares_Uq = g_Uq.square()
        zeros_N = g_Uq.new_zeros(self.examples)
        squares = inner_N = None
        if "second_moment" in wants:
            squares = g_Uq.new_zeros(self.shape).index_add_(0, row_U, squares_Uq)
        if direction is not None:
            inner_N = zeros_N.index_add(0, example_U, (g_Uq * direction.reshape(self.shape)[row_U].to(g_Uq)).sum(1))
        gram_NN = self._gram() if "gram" in wants else None
        return Statistics(zeros_N.index_add(0, example_U, squares_Uq.sum(1)), squares, inner_N, gram_NN)

    def _gram(self) -> Tensor:
        gram_NN = self.grads_Uq.new_zeros(self.examples, self.examples)
        for rows in blocks(self.shape[0], self.examples * self.shape[1], self.grads_Uq):
            mine_U = (self.row_U >= rows.start) & (self.row_U < rows.stop)
            height = rows.stop - rows.start
            part = Lookup(
                self.example_U[mine_U], self.row_U[mine_U] - rows.start, self.grads_Uq[mine_U],
                self.examples, (height, self.shape[1]),
            )  # fmt: skip
            g_Nd = flat_rows(part.rows(slice(None)))
            gram_NN += g_Nd @ g_Nd.T
        return gram_NN


@dataclass(frozen=True)
class Convolved(Factor):
    """g_i of a convolution's weight: one convolution with the examples as groups gives those of several at once.

    `inputs` and `deltas` are (N, t, channels, *space) with t images an example; `settings` are what the operation takes
    after the sizes of its bias: stride, padding, dilation, transposed, output padding.
    """

    inputs: Tensor
    deltas: Tensor
    shape: tuple[int, ...]
    groups: int
    settings: tuple[Any, ...]

    def rows(self, some: slice) -> Tensor:
        n = len(self.inputs[some])
        x, delta = (
            t[some].movedim(1, 0).flatten(1, 2) for t in (self.inputs, self.deltas)
        )  # (t, n * channels, *space)
        weight = x.new_empty(()).expand(n * self.shape[0], *self.shape[1:])
        grads = torch.ops.aten.convolution_backward(
            delta, x, weight, None, *self.settings, n * self.groups, [False, True, False]
        )
        whole: Tensor = grads[1]
        return whole.view(n, *self.shape)

    def along(self, direction: Tensor) -> Tensor:
        """The operation itself with the direction as its weight: <delta, conv(x, v)>."""
        x, delta = (t.flatten(0, 1) for t in (self.inputs, self.deltas))
        weight = direction.reshape(self.shape).to(x.dtype)
        result: Tensor = torch.ops.aten.convolution(x, weight, None, *self.settings, self.groups)
        by_image = result.mul_(delta).sum(tuple(range(1, delta.ndim)))  # without a copy, whatever the memory format
        return by_image.view(len(self.inputs), -1).sum(1)

    def statistics(self, wants: Wants, direction: Tensor | None) -> Statistics:
        return in_chunks(self.rows, self.inputs, len(self.inputs), prod(self.shape), wants, direction)

    def formed(self) -> Factor:
        """All at once if they take no more than twice the memory: <g_i, v> is then a product instead of a
        convolution."""
        small = len(self.inputs) * prod(self.shape) <= 2 * (self.inputs.numel() + self.deltas.numel())
        return Direct(self.rows(slice(None))) if small else self


@dataclass(frozen=True)
class Together(Factor):
    """A parameter that is used several times: the gradients of its uses add up, in the shape of the parameter."""

    uses: Sequence[Use]
    parts: Sequence[Factor]
    examples: int
    param: Tensor

    def rows(self, some: slice) -> Tensor:
        first, last, _ = some.indices(self.examples)
        total = self.param.new_zeros(last - first, self.param.numel(), dtype=self.dtype)
        for use, part in zip(self.uses, self.parts, strict=True):
            total += use.rows_to_parameter(part.rows(slice(first, last))).to(total.dtype)
        return total.reshape(last - first, *self.param.shape)

    def along(self, direction: Tensor) -> Tensor:
        total_N = self.param.new_zeros(self.examples, dtype=self.dtype)
        for use, part in zip(self.uses, self.parts, strict=True):
            total_N += part.along(use.from_parameter(direction)).to(self.dtype)
        return total_N

    def kept(self, storages: Collection[int]) -> "Together":
        return replace(self, parts=[part.kept(storages) for part in self.parts], param=self.param.detach())

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.param.dtype, torch.float32)

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    def statistics(self, wants: Wants, direction: Tensor | None) -> Statistics:
        return in_chunks(self.rows, self.param, self.examples, self.param.numel(), wants, direction)


def in_chunks(
    rows: Callable[[slice], Tensor], like: Tensor, examples: int, size: int, wants: Wants, direction: Tensor | None
) -> Statistics:
    """The statistics of gradients that are formed, a bounded number of scalars of them at a time; `rows` are new."""
    norms, inner, sums = [], [], []
    squares_d: Tensor | None = None
    gram: list[Tensor] = []
    every_pair = "gram" in wants
    every = blocks(examples, size, like, large=every_pair)
    for some in every:
        g_nd = flat_rows(rows(some))
        sums.append(g_nd.sum(0))
        if direction is not None:
            inner.append(g_nd @ direction.reshape(-1).to(g_nd.dtype))
        if every_pair:
            others = (g_nd if other == some else flat_rows(rows(other)) for other in every)
            gram.append(torch.cat([g_nd @ other_nd.T for other_nd in others], 1))
        if "second_moment" not in wants:
            norms.append(torch.linalg.vector_norm(g_nd, dim=1).square_())
        else:
            g_nd.square_()
            norms.append(g_nd.sum(1))
            squares_d = g_nd.sum(0) if squares_d is None else squares_d + g_nd.sum(0)
    return Statistics(
        torch.cat(norms),
        squares_d,
        torch.cat(inner) if inner else None,
        torch.cat(gram) if gram else None,
        torch.stack(sums).sum(0),
    )


@cache
def _unit_normal(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    r = torch.randn(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    unit: Tensor = (r / r.norm().clamp_min(1e-300)).to(device=device, dtype=dtype)
    return unit


def unit_normal(size: int, like: Tensor) -> Tensor:
    """A random unit vector, always the same for its size."""
    return _unit_normal(size, like.dtype, like.device)


def blocks(count: int, each: int, like: Tensor, *, large: bool = False) -> list[slice]:
    """Slices of `count` things of `each` scalars, a bounded number of scalars together on the device of `like`."""
    bound = LARGE_BLOCK if large else BLOCK_SCALARS.get(like.device.type, LARGE_BLOCK)
    height = max(1, bound // max(1, each))
    return [slice(start, min(start + height, count)) for start in range(0, count, height)]
