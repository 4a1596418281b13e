"""The slow twin of the Gauss-Newton matrix: Jacobian by central differences, output Hessian in closed form.

Neither uses a derivative of autograd. Shapes: N = examples, C = outputs of one element, E = elements, D = parameters.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from cases import Built
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from twins import trainable


def outputs_at(built: Built, theta_D: Tensor, seed: int) -> Tensor:
    """The model's output at other parameters, under the masks of `seed`."""
    params = trainable(built.model)
    pieces = theta_D.split([p.numel() for p in params.values()])
    values = {n: piece.view(p.shape) for (n, p), piece in zip(params.items(), pieces, strict=True)}
    inputs = built.batch["x"] if isinstance(built.batch, dict) else built.batch[0]
    buffers = {n: b.clone() for n, b in built.model.named_buffers()}
    torch.manual_seed(seed)
    with torch.no_grad():
        return functional_call(built.model, {**values, **buffers}, (inputs,))


def dense_jacobian(built: Built, seed: int = 0, step: float = 1e-6) -> Tensor:
    """d outputs / d theta, shape (*outputs, D), column by column."""
    theta_D = torch.cat([p.detach().reshape(-1) for p in trainable(built.model).values()])
    columns = []
    for i in range(theta_D.numel()):
        offset = torch.zeros_like(theta_D)
        offset[i] = step
        ahead, behind = (outputs_at(built, theta_D + s * offset, seed) for s in (1, -1))
        columns.append((ahead - behind) / (2 * step))
    return torch.stack(columns, -1)


def output_hessian(built: Built, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Second derivative of the mean loss by each element's outputs, from the formulas; and the same order of outputs.

    Returns hessian_ECC and an index (E, C) into the flat outputs.
    """
    theta_D = torch.cat([p.detach().reshape(-1) for p in trainable(built.model).values()])
    z = outputs_at(built, theta_D, seed)
    index = torch.arange(z.numel()).view(z.shape)
    if isinstance(built.loss, nn.CrossEntropyLoss):
        z_EC, index_EC = (t.movedim(1, -1).reshape(-1, z.shape[1]) for t in (z, index))
        p_EC = z_EC.softmax(-1)
        curvature = torch.diag_embed(p_EC) - p_EC[:, :, None] * p_EC[:, None, :]
        share_E = cross_entropy_shares(built.loss, built.batch[1].reshape(-1), z.shape[1])
        return share_E[:, None, None] * curvature, index_EC
    return diagonal(built, z).view(-1, 1, 1), index.view(-1, 1)


def cross_entropy_shares(loss: nn.CrossEntropyLoss, targets_E: Tensor, classes: int) -> Tensor:
    """The factor of diag(p) - pp' of each element in the loss."""
    weights = torch.ones(classes, dtype=torch.float64) if loss.weight is None else loss.weight
    s, masses, denominator = loss.label_smoothing, [], 0.0
    for t in targets_E.tolist():
        if t == loss.ignore_index:
            masses.append(0.0)
            continue
        masses.append(float((1 - s) * weights[t] + s / classes * weights.sum()))
        denominator += float(weights[t])
    return torch.tensor(masses) / (1.0 if loss.reduction == "sum" else denominator)


def diagonal(built: Built, z: Tensor) -> Tensor:
    """Losses that act on each output by itself."""
    if isinstance(built.loss, nn.MSELoss):
        return torch.full_like(z, 2 / z.numel())
    if isinstance(built.loss, nn.BCEWithLogitsLoss):
        p = 1 / (1 + torch.exp(-z))
        return p * (1 - p) / z.numel()
    return torch.cosh(z - built.batch["y"]) ** -2 / z.shape[0]  # log cosh, mean over the examples


def dense_gauss_newton(built: Built, seed: int = 0) -> Tensor:
    """sum_e J_e' H_e J_e."""
    j = dense_jacobian(built, seed)
    j = j.reshape(-1, j.shape[-1])
    hessian_ECC, index_EC = output_hessian(built, seed)
    total = torch.zeros(j.shape[1], j.shape[1], dtype=j.dtype)
    for h_CC, index_C in zip(hessian_ECC, index_EC, strict=True):
        total += j[index_C].T @ h_CC.to(j) @ j[index_C]
    return total


@contextmanager
def pinned(forward: bool) -> Iterator[None]:
    """What surrounds the forwards of an operator in tests: seed 0, attention that can be differentiated twice."""
    if forward:
        torch.manual_seed(0)
    with sdpa_kernel(SDPBackend.MATH):
        yield


def matrix_of(operator: Any) -> Tensor:
    return torch.stack([operator.matvec(e) for e in torch.eye(operator.size, dtype=operator.dtype)], 1)
