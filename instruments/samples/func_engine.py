"""Per-example gradients by torch.func: vmap over the examples of the gradient of one."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from instruments.objective import Batch, plain_tree
from instruments.refusal import Refusal
from instruments.samples.independence import check_at_rest, refuse_interaction, whole_batch
from instruments.samples.problem import BatchMoments, SampleProblem, flat_pieces, flat_rows
from instruments.samples.rows import CHUNK_SCALARS, statistics_of_rows


def moments(problem: SampleProblem, batch: Batch) -> BatchMoments:
    """The moments of the unnormalised per-example losses, chunk by chunk.

    The losses of the examples one by one are compared with those of the whole batch; where they differ and no random
    number was drawn, the examples interact (contrastive losses, batch statistics) and the reading is refused.
    """
    whole_N, denominator, random = whole_batch(problem, batch)
    if random:
        check_at_rest(problem, batch)
    leaves, spec = tree_flatten(plain_tree(batch))
    n, layout = whole_N.shape[0], problem.layout
    mapped = [isinstance(leaf, Tensor) and leaf.ndim > 0 for leaf in leaves]
    if not any(mapped) or any(m and leaf.shape[0] != n for leaf, m in zip(leaves, mapped, strict=True)):
        raise Refusal(f"not every tensor of the batch has the {n} examples as its leading dimension.")
    params = dict(zip(layout.names, (p.detach() for p in layout.params), strict=True))

    def one(values: dict[str, Tensor], *example: Any) -> Tensor:
        rows = [leaf.unsqueeze(0) if m else leaf for leaf, m in zip(example, mapped, strict=True)]

        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(problem.module, values, args, kwargs)

        total: Tensor = problem.objective.parts(call, tree_unflatten(rows, spec)).total
        return total

    dims = (None, *(0 if m else None for m in mapped))
    per_example = vmap(grad_and_value(one), in_dims=dims, randomness="different")
    chunk = max(1, min(n, CHUNK_SCALARS // max(1, layout.size)))

    def chunks() -> Iterator[Tensor]:
        losses = []
        with problem.running():
            for start in range(0, n, chunk):
                rows = [leaf[start : start + chunk] if m else leaf for leaf, m in zip(leaves, mapped, strict=True)]
                grads, values_n = per_example(params, *rows)
                losses.append(values_n.detach())
                yield torch.cat([flat_rows(grads[name].detach()) for name in layout.names], 1)
        if not random:
            refuse_interaction(torch.cat(losses), whole_N)

    try:
        found = statistics_of_rows(problem, chunks)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise Refusal(f"torch.func cannot trace this model or loss: {_first_line(error)}") from error
    return BatchMoments.of(problem, found.statistics, flat_pieces(layout, found.sum_D), denominator, "torch.func")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
