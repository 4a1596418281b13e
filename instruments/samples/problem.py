"""What an engine of per-example gradients is given, and what it gives back.

Shapes: N = examples of one batch, D = trainable scalars, L = trained parameter tensors, d = scalars of one of them.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from instruments.layout import Layout
from instruments.objective import Batch, Objective

if TYPE_CHECKING:
    from instruments.samples.kept import KeptFactors

Want = Literal["second_moment", "inner_products", "gram"]
Wants = frozenset[Want]


@dataclass(frozen=True)
class SampleProblem:
    """A model at rest, its loss, and `running`: the pinned context in which every forward happens, with kernels that
    can be vectorised unless it is called with `differentiable=False`, then with the user's own.

    `wants` is what is to be computed beside the norms and the sum. Inner products are taken with `direction_D`, or,
    where that is None, with the sum of the batch itself. `plans` is what the fused engine remembers of a model, `kept`
    what it is to fill for products with a direction that is known later. `grads`, by parameter, is what the mean of the
    g_i may be: the gradient that training has computed of this batch. An engine that uses it proves it first.
    """

    module: nn.Module
    layout: Layout
    objective: Objective
    running: Callable[..., AbstractContextManager[None]]
    wants: frozenset[Want] = frozenset()
    direction_D: Tensor | None = None
    plans: dict[Any, Any] = field(default_factory=dict)
    kept: "KeptFactors | None" = None
    grads: Sequence[Tensor | None] | None = None

    def only(self, chosen: Collection[int]) -> "SampleProblem":
        """The same for some of the parameters, in the order of the layout."""
        kept = [index in chosen for index in range(len(self.layout.params))]
        part = Layout(
            tuple(name for name, keep in zip(self.layout.names, kept, strict=True) if keep),
            tuple(p for p, keep in zip(self.layout.params, kept, strict=True) if keep),
        )
        if self.direction_D is None:
            return replace(self, layout=part, grads=None)
        pieces = zip(flat_pieces(self.layout, self.direction_D), kept, strict=True)
        direction_D = torch.cat([piece for piece, keep in pieces if keep])
        return replace(self, layout=part, direction_D=direction_D, grads=None)


@dataclass(frozen=True)
class Statistics:
    """Of the gradients g_i (one parameter tensor, N examples): |g_i|^2, sum g_i^2, <g_i, direction>, <g_i, g_j>, and
    their sum where it costs nothing."""

    norms_sq_N: Tensor
    squares_d: Tensor | None = None
    inner_N: Tensor | None = None
    gram_NN: Tensor | None = None
    sum_d: Tensor | None = None


@dataclass(frozen=True)
class BatchMoments:
    """Of one batch, in the unit of `total` (the sum over examples), before division by `denominator`.

    `norms_sq_NL` and `inner_NL` have a column for each parameter tensor; `sums` and `squares` are flat, one a parameter
    tensor. Where `averaged`, the sums are divided already, belong to the user, and the inner products are with them.
    """

    norms_sq_NL: Tensor
    sums: Sequence[Tensor]
    denominator: Tensor | float
    engine: str
    squares: Sequence[Tensor] | None = None
    inner_NL: Tensor | None = None
    gram_NN: Tensor | None = None
    averaged: bool = False

    @classmethod
    def of(
        cls,
        problem: SampleProblem,
        parts: Sequence[Statistics],
        sums: Sequence[Tensor],
        denominator: Tensor | float,
        engine: str,
        *,
        averaged: bool = False,
    ) -> "BatchMoments":
        """From the statistics of each parameter tensor, in the order of the layout."""
        dtype, wants = problem.layout.dtype, problem.wants

        def columns(name: str) -> list[Tensor]:
            found = [getattr(part, name) for part in parts]
            return [t if t.dtype == dtype else t.to(dtype) for t in found]

        return cls(
            torch.stack(columns("norms_sq_N"), 1),
            sums,
            denominator,
            engine,
            [c.reshape(-1) for c in columns("squares_d")] if "second_moment" in wants else None,
            torch.stack(columns("inner_N"), 1) if "inner_products" in wants else None,
            torch.stack(columns("gram_NN")).sum(0) if "gram" in wants else None,
            averaged,
        )


Engine = Callable[[SampleProblem, Batch], BatchMoments]


def flat_pieces(layout: Layout, v_D: Tensor) -> Sequence[Tensor]:
    """The pieces of v_D, one a parameter tensor, flat."""
    return torch.split(v_D, [p.numel() for p in layout.params])


def flat_rows(t: Tensor) -> Tensor:
    """(n, d) from (n, *shape), where the shape has no dimension or no element too."""
    return t.reshape(len(t), prod(t.shape[1:]))
