"""Statistics of per-example gradients that come as rows, a bounded number of examples at a time.

Shapes: N = examples of one batch, n = examples of one chunk, D = trainable scalars, d = scalars of one parameter.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from instruments.layout import Layout
from instruments.refusal import Refusal
from instruments.samples.problem import SampleProblem, Statistics, flat_pieces

CHUNK_SCALARS = 2**23
"""Per-example gradients held at a time, in scalars (32 MiB in float32)."""
MOST_SCALARS = 2**27
"""Per-example gradients held at a time where all pairs of examples are asked for."""

Chunks = Callable[[], Iterable[Tensor]]


class Rows(NamedTuple):
    statistics: list[Statistics]
    sum_D: Tensor


def statistics_of_rows(problem: SampleProblem, chunks: Chunks) -> Rows:
    """`chunks()` yields grads_nD, example after example. It is called again where a second pass is needed.

    Inner products with the sum of the batch need the sum first: one more pass, unless there is a single chunk. All
    pairs of examples need all rows at once and are refused where these are too many.
    """
    layout, wants = problem.layout, problem.wants
    if "gram" in wants:
        whole_ND = torch.cat(list(chunks()))
        if whole_ND.numel() > MOST_SCALARS:
            raise Refusal(f"all pairs of {len(whole_ND)} examples with {layout.size} parameters are too many.")
        return _reduce(layout, problem, [whole_ND])
    if "inner_products" not in wants or problem.direction_D is not None:
        return _reduce(layout, problem, chunks())
    kept: list[Tensor] = []
    sum_D = torch.zeros(layout.size, dtype=layout.dtype, device=layout.device)
    for count, grads_nD in enumerate(chunks()):
        sum_D += grads_nD.sum(0)
        kept = [grads_nD] if count == 0 else []
    return _reduce(layout, problem, kept or chunks(), sum_D)


def _reduce(
    layout: Layout, problem: SampleProblem, chunks: Iterable[Tensor], direction_D: Tensor | None = None
) -> Rows:
    wants = problem.wants
    direction_D = problem.direction_D if direction_D is None else direction_D
    sum_D = torch.zeros(layout.size, dtype=layout.dtype, device=layout.device)
    squares_D = torch.zeros_like(sum_D) if "second_moment" in wants else None
    norms, inner, grams = [], [], []
    for grads_nD in chunks:
        rows_nD = grads_nD.to(layout.dtype)
        squares_nD = rows_nD.square()
        norms.append(_by_parameter(layout, squares_nD))
        chunk_sum_D = rows_nD.sum(0)
        sum_D += chunk_sum_D
        if squares_D is not None:
            squares_D += squares_nD.sum(0)
        if "inner_products" in wants:
            along_D = chunk_sum_D if direction_D is None else direction_D
            inner.append(_by_parameter(layout, rows_nD * along_D))
        if "gram" in wants:
            grams = [piece_nd @ piece_nd.T for piece_nd in _columns(layout, rows_nD)]
    norms_NL = torch.cat(norms)
    inner_NL = torch.cat(inner) if inner else None
    pieces = flat_pieces(layout, squares_D) if squares_D is not None else None
    statistics = [
        Statistics(
            norms_NL[:, index],
            None if pieces is None else pieces[index],
            None if inner_NL is None else inner_NL[:, index],
            grams[index] if grams else None,
        )
        for index in range(len(layout.params))
    ]
    return Rows(statistics, sum_D)


def _columns(layout: Layout, rows_nD: Tensor) -> list[Tensor]:
    return list(torch.split(rows_nD, [p.numel() for p in layout.params], 1))


def _by_parameter(layout: Layout, rows_nD: Tensor) -> Tensor:
    return torch.stack([piece_nd.sum(1) for piece_nd in _columns(layout, rows_nD)], 1)
