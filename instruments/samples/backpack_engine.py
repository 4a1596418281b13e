"""Per-example gradient statistics by BackPACK, in about two gradients, for models made of layers that it knows.

BackPACK hooks modules and writes onto parameters; both happen on a shadow of the model that shares the storage of its
parameters, so the user's modules and parameters carry nothing afterwards.
(Dangel, Kunstner and Hennig 2020, "BackPACK: packing more into backprop".)
"""

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from instruments.objective import Batch, no_examples
from instruments.refusal import Refusal
from instruments.samples.independence import check_by_half
from instruments.samples.problem import BatchMoments, SampleProblem, Statistics, flat_pieces, flat_rows

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def moments(problem: SampleProblem, batch: Batch) -> BatchMoments:
    """Norms by BatchL2Grad and squares by SumGradSquared; inner products need BatchGrad, which holds all N x D."""
    refuse_unknown_layers(problem)
    try:
        from backpack import backpack, extend
    except Exception as error:
        raise Refusal(f"BackPACK cannot be imported: {type(error).__name__}: {error}") from error
    shadow, aliases = shadow_of(problem)
    calls = count_calls(shadow)
    try:
        extend(shadow)
        with torch.enable_grad(), problem.running(), backpack(*_extensions(problem)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its hooks note that inputs need no gradient
            parts = problem.objective.parts(shadow, batch)
            if parts.sums_N is None:
                raise no_examples()
            refuse_calls(calls, parts.examples)
            # Into the aliases only: a network inside the loss keeps the gradients that wait for its own optimizer.
            parts.total.backward(inputs=aliases)  # type: ignore[no-untyped-call]
    except (RuntimeError, AttributeError, ValueError, TypeError) as error:
        raise Refusal(f"BackPACK cannot read this model: {type(error).__name__}: {error}") from error
    check_by_half(problem, batch, parts.sums_N.detach())
    sum_D = problem.layout.join([alias.grad for alias in aliases])
    direction_D = sum_D if problem.direction_D is None else problem.direction_D
    pieces = flat_pieces(problem.layout, direction_D)
    statistics = [
        _statistics(problem, alias, parts.examples, piece) for alias, piece in zip(aliases, pieces, strict=True)
    ]
    return BatchMoments.of(problem, statistics, flat_pieces(problem.layout, sum_D), parts.denominator, "backpack")


def _extensions(problem: SampleProblem) -> list[Any]:
    from backpack.extensions import BatchGrad, BatchL2Grad, SumGradSquared

    squares = [SumGradSquared()] if "second_moment" in problem.wants else []
    return [BatchL2Grad(), *squares, *([BatchGrad()] if problem.wants & {"gram", "inner_products"} else [])]


def _statistics(problem: SampleProblem, alias: Any, examples: int, direction_d: Tensor) -> Statistics:
    """What BackPACK wrote onto a parameter; zeros where the loss does not reach it."""
    if alias.grad is None:
        zeros_N = torch.zeros(examples, dtype=alias.dtype, device=alias.device)
        return Statistics(zeros_N, torch.zeros_like(alias), zeros_N, zeros_N.new_zeros(examples, examples))
    squares_d = alias.sum_grad_squared if "second_moment" in problem.wants else None
    if not problem.wants & {"gram", "inner_products"}:
        return Statistics(alias.batch_l2, squares_d)
    g_Nd = flat_rows(alias.grad_batch)
    return Statistics(alias.batch_l2, squares_d, g_Nd @ direction_d.to(g_Nd), g_Nd @ g_Nd.T)


def refuse_unknown_layers(problem: SampleProblem) -> None:
    """Every trained parameter must sit in exactly one layer of a class (not a subclass) that BackPACK knows."""
    owners: dict[int, list[nn.Module]] = {}
    for module in problem.module.modules():
        for q in module.parameters(recurse=False):
            owners.setdefault(id(q), []).append(module)
    for name, p in zip(problem.layout.names, problem.layout.params, strict=True):
        modules = owners.get(id(p), [])
        if len(modules) != 1:
            raise Refusal(f"parameter '{name}' is shared by {len(modules)} modules.")
        if type(modules[0]) not in LAYERS:
            raise Refusal(f"parameter '{name}' sits in {type(modules[0]).__name__}, which has no rule.")
        if _unsound(modules[0]):
            raise Refusal(f"parameter '{name}' sits in a convolution with groups or without zero padding.")


def _unsound(layer: nn.Module) -> bool:
    """BatchL2Grad of BackPACK 1.7 is wrong for grouped convolutions and for padding with anything but zeros."""
    return getattr(layer, "groups", 1) != 1 or getattr(layer, "padding_mode", "zeros") != "zeros"


def shadow_of(problem: SampleProblem) -> tuple[nn.Module, list[Tensor]]:
    """A copy of the module tree over the same storage: parameters are aliased, nothing of size D is copied."""
    memo: dict[int, object] = {}
    for q in problem.module.parameters():
        memo[id(q)] = nn.Parameter(q.detach(), requires_grad=q.requires_grad)
    try:
        shadow = copy.deepcopy(problem.module, memo)
    except Exception as error:  # a user's module may hold anything
        raise Refusal(f"the model cannot be copied for BackPACK: {error}") from error
    return shadow, [memo[id(p)] for p in problem.layout.params]  # type: ignore[misc]


Calls = dict[int, list[int]]


def count_calls(shadow: nn.Module) -> Calls:
    """Leading output dimension of every call of every layer with parameters."""
    calls: Calls = {}
    for module in shadow.modules():
        if type(module) in LAYERS:
            sizes = calls.setdefault(id(module), [])
            module.register_forward_hook(lambda m, i, out, sizes=sizes: sizes.append(out.shape[0]))
    return calls


def refuse_calls(calls: Calls, examples: int) -> None:
    """BackPACK takes every call of a layer for one with all examples, once a forward pass."""
    for sizes in calls.values():
        if len(sizes) > 1 or any(size != examples for size in sizes):
            raise Refusal("a layer is called twice a forward pass, or without the examples as leading dimension.")
