"""Diagonals of the curvature by BackPACK, exact or by its own drawn targets, for chains of layers that it knows.

    DiagGGNExact    diagonal of the Gauss-Newton matrix, one column of the loss's Hessian for every output
    DiagGGNMC       the same from one drawn target an element, M times
    DiagHessian     diagonal of the Hessian; more columns for every feature behind a curved activation

Read is what is a chain: `nn.Sequential`, nested at will, of layers whose classes BackPACK has rules for, each called
once. Where a model does other things between its layers, BackPACK 1.7 mostly stops, but not always.

(Dangel, Kunstner and Hennig 2020, "BackPACK: packing more into backprop", section 3.)

Shapes: N = examples, C = columns carried back for one example, D = trainable scalars, M = draws.
"""

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from instruments.diagonals.draws import Draws
from instruments.objective import Batch, ModuleObjective, Objective
from instruments.refusal import Refusal
from instruments.samples.backpack_engine import count_calls, refuse_calls, refuse_unknown_layers, shadow_of
from instruments.samples.problem import SampleProblem

Extension = Literal["DiagGGNExact", "DiagGGNMC", "DiagHessian"]
INSTEAD = "read by random signs or drawn targets instead."
SAVED: dict[Extension, str] = {"DiagGGNExact": "diag_ggn_exact", "DiagGGNMC": "diag_ggn_mc", "DiagHessian": "diag_h"}
CURVED = (nn.ELU, nn.SELU, nn.Sigmoid, nn.LogSigmoid, nn.Tanh)
"""Activations whose second derivative is not zero: each adds its features to the columns of the Hessian."""


def backpack_diagonal(
    problem: SampleProblem, batches: Sequence[Batch], extension: Extension, *, seed: int = 0, draws: int = 1
) -> tuple[Draws, int]:
    """One exact row, or `draws` rows of DiagGGNMC, batches weighted as the Hessian weighs them; and C, at most.

    Raises Refusal for models, losses and targets that BackPACK cannot read or reads wrongly.
    """
    loss = _known_loss(problem.objective)
    refuse_unknown_layers(problem)
    _refuse_other_than_chains(problem.module, extension)
    count = draws if extension == "DiagGGNMC" else 1
    rows, columns = [], 1
    for m in range(count):
        total_D = torch.zeros(problem.layout.size, dtype=problem.layout.dtype, device=problem.layout.device)
        weights: Tensor | float = 0.0
        for stream, batch in enumerate(batches):
            found_D, weight, columns = _of_batch(problem, batch, loss, extension, (seed << 20) + stream * count + m)
            total_D += weight * found_D
            weights = weights + weight
        rows.append(total_D / weights)
    who = f"BackPACK {extension}" + (f", {count} draws of the targets" if extension == "DiagGGNMC" else "")
    return Draws(torch.stack(rows), who), columns


def _of_batch(
    problem: SampleProblem, batch: Batch, loss: nn.Module, extension: Extension, seed: int
) -> tuple[Tensor, Tensor | float, int]:
    """Diagonal of the loss of one batch, its weight among batches, and the columns that were carried back."""
    shadow, aliases = shadow_of(problem)
    calls, widths = count_calls(shadow), _watch_widths(shadow, extension)
    with torch.no_grad(), problem.running():
        parts = problem.objective.parts(problem.module, batch)
    inputs, targets = batch
    _refuse_ignored(loss, targets)
    try:
        from backpack import backpack, extend, extensions

        extend(shadow), extend(loss)
        with torch.enable_grad(), problem.running(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its hooks note that inputs need no gradient
            with backpack(getattr(extensions, extension)()):
                outputs = shadow(inputs)
                refuse_calls(calls, parts.examples)
                total = loss(outputs, targets)
                torch.manual_seed(seed)  # of drawn targets; the state comes back with all the others
                total.backward(inputs=aliases)
    except (RuntimeError, AttributeError, ValueError, TypeError, NotImplementedError, AssertionError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise Refusal(f"BackPACK cannot read this model: {type(error).__name__}: {error}") from error
    pieces = [getattr(alias, SAVED[extension], None) for alias in aliases]
    pooled = problem.objective.pooled_by_denominator
    carried = 1 if extension == "DiagGGNMC" else outputs[0].numel() + sum(widths)
    return problem.layout.join(pieces), parts.denominator if pooled else float(parts.examples), carried


def _known_loss(objective: Objective) -> nn.Module:
    """A copy of the loss module, which BackPACK may hang its hooks on."""
    loss = objective._module if isinstance(objective, ModuleObjective) else None
    if type(loss) not in (nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss):
        what = "a loss function" if loss is None else type(loss).__name__
        raise Refusal(
            f"BackPACK has no second derivatives of {what}, only of CrossEntropyLoss, MSELoss and BCEWithLogitsLoss; "
            f"{INSTEAD}"
        )
    assert loss is not None
    if any(getattr(loss, name, None) is not None for name in ("weight", "pos_weight")):
        raise Refusal(f"BackPACK has no second derivatives of losses with class weights; {INSTEAD}")
    return copy.deepcopy(loss)


def _refuse_ignored(loss: nn.Module, targets: Tensor) -> None:
    """BackPACK divides by all elements, whether or not they count."""
    if isinstance(loss, nn.CrossEntropyLoss):
        if targets.is_floating_point():
            raise Refusal(f"BackPACK is not used for targets that are class probabilities; {INSTEAD}")
        if bool((targets == loss.ignore_index).any()):
            raise Refusal(f"BackPACK does not know that some targets are ignored; {INSTEAD}")


def _refuse_other_than_chains(module: nn.Module, extension: Extension) -> None:
    """Raises Refusal unless the model is a chain of layers with a rule that is right."""
    from backpack import extensions

    known = getattr(extensions, extension)()._BackpropExtension__module_extensions
    for layer in _chain(module):
        if type(layer) not in known:
            raise Refusal(f"{extension} of BackPACK has no rule for {type(layer).__name__}; {INSTEAD}")
        if getattr(layer, "divisor_override", None) is not None:
            raise Refusal(f"BackPACK reads an average pool with divisor_override wrongly; {INSTEAD}")
    if any(m._forward_hooks or m._forward_pre_hooks for m in module.modules()):
        raise Refusal(f"the model has forward hooks, which may do what BackPACK does not see; {INSTEAD}")


def _chain(module: nn.Module) -> Iterator[nn.Module]:
    """The layers in the order of their calls. Only of nn.Sequential is it known that nothing else happens between."""
    if type(module) is nn.Sequential:
        for child in module:
            yield from _chain(child)
    elif next(module.children(), None) is not None:
        raise Refusal(
            f"BackPACK's second derivatives need a chain of layers (nn.Sequential), got {type(module).__name__}."
        )
    else:
        yield module


def _watch_widths(shadow: nn.Module, extension: Extension) -> list[int]:
    """Filled by a forward pass with the features of every curved activation, for the Hessian."""
    widths: list[int] = []
    if extension == "DiagHessian":
        for layer in _chain(shadow):
            if isinstance(layer, CURVED):
                layer.register_forward_hook(lambda m, i, out: widths.append(out[0].numel()))

    return widths
