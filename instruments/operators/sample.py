"""The Hessian on a few examples of the held batches: where to look, at a fraction of the price.

A quarter of the sample are the examples of highest loss, the rest is drawn from the others and weighted for all of
them, so that the matrix is unbiased. Its top eigenvector is close to that of the whole matrix (cosine about 0.9 for an
eighth of 512 examples) where nothing else is known of it; its eigenvalues are not read.

Shapes: N = examples of one batch, n = those sampled.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from instruments.layout import Layout
from instruments.objective import Batch, Objective, Parts, addends, plain_tree, tensors_of
from instruments.operators.hessian import Context, HessianOperator, Piece

SHARE, LEAST, LOSSIEST = 1 / 8, 4, 1 / 4
"""Of the examples: how many are sampled, and no fewer than 4; of these, how many for their loss."""


@dataclass(frozen=True)
class Seen:
    """What the whole evaluation of a batch has shown of its examples."""

    losses_N: Tensor
    denominator: Tensor | float


class SampledHessian(HessianOperator):
    """H of the sample, on a graph of its own; `share` is what it costs of the whole, `due` what is not billed yet."""

    def __init__(self, pieces: Sequence[Piece], layout: Layout, share: float, context: Context) -> None:
        super().__init__(pieces, layout, context=context)
        self.share = self.due = share
        self.price *= share


def sampled_hessian(
    objective: Objective,
    call: Callable[..., Any],
    batches: Sequence[Batch],
    seen: Sequence[Seen | None],
    layout: Layout,
    context: Context,
    seed: int,
) -> SampledHessian | None:
    """None where examples cannot be taken apart, or are too few for a part of them to be of use."""
    pieces, taken, total = [], 0, 0
    generator = torch.Generator().manual_seed(seed)
    for batch, about in zip(batches, seen, strict=True):
        if about is None or not _divisible(batch, len(about.losses_N)):
            return None
        index_n, weight_n = _chosen(about.losses_N, generator)
        taken, total = taken + len(index_n), total + len(about.losses_N)
        pieces.append(_piece(objective, call, _rows(batch, index_n), weight_n, about))
    if taken < LEAST or taken > total / 2:
        return None
    return SampledHessian(pieces, layout, taken / total, context)


def _divisible(batch: Batch, examples: int) -> bool:
    """Whether every tensor of the batch has the examples as its leading dimension, so that rows of it are a batch."""
    return all(t.ndim and len(t) == examples for t in tensors_of(batch))


def _rows(batch: Batch, index_n: Tensor) -> Batch:
    return tree_map(lambda leaf: leaf[index_n.to(leaf.device)] if isinstance(leaf, Tensor) else leaf, plain_tree(batch))


def _chosen(losses_N: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Places and weights. The weights of those drawn make up for the ones that were not."""
    count = math.ceil(SHARE * len(losses_N))
    first = int(LOSSIEST * count)
    order_N = losses_N.argsort(descending=True).cpu()
    rest = order_N[first:]
    drawn = rest[torch.randperm(len(rest), generator=generator)[: count - first]]
    weight_n = torch.ones(count, dtype=losses_N.dtype, device=losses_N.device)
    weight_n[first:] = len(rest) / len(drawn)
    return torch.cat([order_N[:first], drawn]), weight_n


def _piece(objective: Objective, call: Callable[..., Any], batch: Batch, weight_n: Tensor, about: Seen) -> Piece:
    def evaluate() -> tuple[Tensor, Tensor | float]:
        sums_n = objective.parts(call, batch).sums_N
        assert sums_n is not None
        return addends(objective, Parts(torch.dot(sums_n, weight_n), about.denominator, len(about.losses_N), sums_n))

    return evaluate
