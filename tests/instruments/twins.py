"""Slow twins: the same quantities by other routes, transcribed from their definitions.

Shapes: N = examples, D = trainable scalars.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def total_loss(model: nn.Module, loss: Any, batch: Any, values: dict[str, Tensor] | None = None) -> Tensor:
    """The training loss as a user would write it."""

    def call(x: Any) -> Any:
        return functional_call(model, values, (x,)) if values is not None else model(x)

    if isinstance(loss, nn.Module):
        return loss(call(batch[0]), batch[1])
    return loss(call, batch).mean()


def flat_loss(model: nn.Module, loss: Any, batch: Any) -> Any:
    """theta_D -> loss."""
    params = trainable(model)

    def f(theta_D: Tensor) -> Tensor:
        pieces = theta_D.split([p.numel() for p in params.values()])
        values = {n: piece.view(p.shape) for (n, p), piece in zip(params.items(), pieces, strict=True)}
        return total_loss(model, loss, batch, values)

    return f, torch.cat([p.detach().reshape(-1) for p in params.values()])


def dense_hessian(model: nn.Module, loss: Any, batch: Any, *, step: float = 1e-5) -> Tensor:
    """Central differences of the gradient, column by column: no second derivative of autograd is involved."""
    f, theta_D = flat_loss(model, loss, batch)

    def gradient(at_D: Tensor) -> Tensor:
        at_D = at_D.clone().requires_grad_()
        return torch.autograd.grad(f(at_D), at_D)[0]

    columns = []
    for i in range(theta_D.numel()):
        offset = torch.zeros_like(theta_D)
        offset[i] = step
        columns.append((gradient(theta_D + offset) - gradient(theta_D - offset)) / (2 * step))
    h = torch.stack(columns, 1)
    return (h + h.T) / 2


def example_gradients(model: nn.Module, loss: Any, batch: Any) -> Tensor:
    """g_ND, one backward an example on a batch of that example alone, scaled so that their mean is the gradient.

    For a mean over what counts (class weights, ignored targets), an example's share is its own sum over the whole
    batch's denominator.
    """
    params = list(trainable(model).values())
    n = (batch["x"] if isinstance(batch, dict) else batch[0]).shape[0]
    rows = []
    for i in range(n):
        alone = tree_map(lambda t, i=i: t[i : i + 1], batch)
        if isinstance(loss, nn.Module):
            summed = type(loss)(**{**_arguments(loss), "reduction": "sum"})
            value = summed(model(alone[0]), alone[1]) * n / _denominator(loss, batch)
        else:
            value = loss(model, alone).sum()
        grads = torch.autograd.grad(value, params, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.to_dense().reshape(-1) for g in grads]))
    return torch.stack(rows)


def _arguments(loss: nn.Module) -> dict[str, Any]:
    names = ("weight", "ignore_index", "label_smoothing")
    return {name: getattr(loss, name) for name in names if hasattr(loss, name)}


def _denominator(loss: Any, batch: Any) -> float:
    if loss.reduction == "sum":
        return 1.0
    targets = batch[1]
    if isinstance(loss, nn.CrossEntropyLoss):
        counted = targets[targets != loss.ignore_index]
        return float(counted.numel() if loss.weight is None else loss.weight[counted].sum())
    return float(targets.numel())
