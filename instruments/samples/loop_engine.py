"""Per-example gradients by one backward pass an example through the graph of the whole batch.

The slowest engine and the one that asks least: ragged batches, recurrent kernels, anything that can be differentiated.
"""

import torch

from instruments.objective import Batch
from instruments.refusal import Refusal
from instruments.samples.independence import check_by_half, no_examples
from instruments.samples.problem import BatchMoments, SampleProblem

MOST_EXAMPLES = 512


def moments(problem: SampleProblem, batch: Batch) -> BatchMoments:
    """|g_i|^2 and sum g_i, N backward passes; refused beyond 512 examples of a batch."""
    layout = problem.layout
    with torch.enable_grad(), problem.running():
        parts = problem.objective.parts(problem.module, batch)
        if parts.sums_N is None:
            raise no_examples()
        if parts.examples > MOST_EXAMPLES:
            raise Refusal(f"a backward pass for each of {parts.examples} examples is too dear (most {MOST_EXAMPLES}).")
        norms_sq, sum_D = [], layout.join([None] * len(layout.params))
        for loss in parts.sums_N:
            g_D = layout.join(torch.autograd.grad(loss, layout.params, retain_graph=True, allow_unused=True))
            norms_sq.append(g_D.square().sum())
            sum_D += g_D
    check_by_half(problem, batch, parts.sums_N.detach())
    return BatchMoments(torch.stack(norms_sq), sum_D, parts.denominator)
