"""Per-example gradients by one backward pass an example through the graph of the whole batch.

The slowest engine and the one that asks least: ragged batches, recurrent kernels, anything that can be differentiated.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from instruments.objective import Batch, no_examples
from instruments.reentrant import refuse_reentrant
from instruments.refusal import Refusal
from instruments.samples.independence import check_by_half
from instruments.samples.problem import BatchMoments, SampleProblem, flat_pieces
from instruments.samples.rows import CHUNK_SCALARS, statistics_of_rows

MOST_EXAMPLES = 512


def moments(problem: SampleProblem, batch: Batch) -> BatchMoments:
    """N backward passes, twice N where inner products with the sum are asked for; refused beyond 512 examples."""
    layout = problem.layout
    with torch.enable_grad(), problem.running():
        parts = problem.objective.parts(problem.module, batch)
        losses_N = parts.sums_N
        if losses_N is None:
            raise no_examples()
        refuse_reentrant(parts.total)
        if parts.examples > MOST_EXAMPLES:
            raise Refusal(f"a backward pass for each of {parts.examples} examples is too dear (most {MOST_EXAMPLES}).")
        chunk = max(1, min(parts.examples, CHUNK_SCALARS // layout.size))

        def gradient(loss: Tensor) -> Tensor:
            return layout.join(torch.autograd.grad(loss, layout.params, retain_graph=True, allow_unused=True))

        def chunks() -> Iterator[Tensor]:
            for some in torch.split(losses_N, chunk):
                yield torch.stack([gradient(loss) for loss in some])

        found = statistics_of_rows(problem, chunks)
    check_by_half(problem, batch, losses_N.detach())
    return BatchMoments.of(problem, found.statistics, flat_pieces(layout, found.sum_D), parts.denominator, "loop")
