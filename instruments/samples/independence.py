"""Do the examples of a batch have losses of their own? Asked of the numbers, not of a list of layer names."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from instruments.guard import RandomStates
from instruments.objective import Batch, FunctionObjective, Parts, Undefined, no_examples, plain_tree
from instruments.refusal import Refusal
from instruments.running import without_graph
from instruments.samples.problem import SampleProblem

RELATIVE, ABSOLUTE = 1e-3, 1e-6


def refuse_undefined(module: nn.Module) -> None:
    """Batch normalisation in training mode couples the examples: no example has a gradient of its own."""
    for name, m in module.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training:
            raise Undefined(
                f"per-example gradients are not defined: {type(m).__name__} '{name}' in training mode mixes the "
                "examples of a batch; put it in eval mode, use GroupNorm or LayerNorm, or read in eval mode by "
                "Cockpit(..., settings=ProbeSettings(mode='eval'))."
            )


def refuse_interaction(alone_N: Tensor, together_N: Tensor) -> None:
    """Compare losses of examples read apart with those read in the whole batch."""
    scale = together_N.abs().mean()
    worst = (alone_N - together_N).abs().max()
    if bool(worst > RELATIVE * scale + ABSOLUTE):
        raise Undefined(
            f"the examples of the batch interact: read apart, an example's loss differs by {worst / scale:.1e} of the "
            "mean loss from its loss within the batch, so no example has a gradient of its own."
        )


def whole_batch(problem: SampleProblem, batch: Batch) -> tuple[Tensor, Tensor | float, bool]:
    """Per-example loss sums of the batch as one, the loss denominator, and whether the forward drew random numbers."""

    def forward() -> tuple[Parts, bool]:
        with problem.running():
            before = RandomStates.of(problem.module)
            return problem.objective.parts(problem.module, batch).detached(), before.moved()

    parts, random = without_graph(problem.plans, forward)
    if parts.sums_N is None:
        raise no_examples()
    return parts.sums_N, parts.denominator, random


def check_by_half(problem: SampleProblem, batch: Batch, together_N: Tensor) -> None:
    """Half of the batch, forward only, against the whole; where random numbers are drawn, without them.

    Batches that cannot be cut are not checked.
    """
    n = together_N.shape[0]
    leaves, spec = tree_flatten(plain_tree(batch))
    if n < 2 or not all(isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == n for leaf in leaves):
        return
    half_N, _, random = whole_batch(problem, tree_unflatten([leaf[: n // 2] for leaf in leaves], spec))
    if random:
        check_at_rest(problem, batch)
    else:
        refuse_interaction(half_N, together_N[: n // 2])


def check_at_rest(problem: SampleProblem, batch: Batch) -> None:
    """Where random numbers are drawn, losses read apart differ anyhow: compared in eval mode, without dropout.

    Raises Undefined where the examples interact, Refusal where random numbers are drawn in eval mode too.
    """
    flags = [(module, module.training) for module in problem.module.modules()]
    running = problem.running

    @contextmanager
    def resting() -> Iterator[None]:
        with running():
            problem.module.eval()
            yield

    try:
        resting_problem = replace(problem, running=resting)
        together_N, _, random = whole_batch(resting_problem, batch)
        if random:
            raise Refusal("random numbers are drawn in eval mode too: nobody can tell whether the examples interact.")
        check_by_half(resting_problem, batch, together_N)
    finally:
        for module, training in flags:
            module.training = training


def refuse_hidden_parameters(problem: SampleProblem, batch: Batch, sums: Sequence[Tensor]) -> None:
    """A loss function may reach the model other than through `call` (a penalty on its parameters, a closed-over model);
    engines that exchange the parameters do not see that. Their summed gradient is compared with the true one."""
    params = problem.layout.params
    hooked = any(p._backward_hooks for p in params)
    if not (isinstance(problem.objective, FunctionObjective) or hooked):
        return
    with torch.enable_grad(), problem.running():
        before = RandomStates.of(problem.module)
        total = problem.objective.parts(problem.module, batch).total
        random = before.moved()
        true_D = problem.layout.join(torch.autograd.grad(total, params, allow_unused=True))
    sum_D = torch.cat(list(sums))
    if not random and bool((true_D - sum_D).norm() > RELATIVE * true_D.norm() + ABSOLUTE):
        raise Refusal("the loss function reaches parameters of the model other than through `call`.")
