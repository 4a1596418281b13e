"""From what an operation saved and the gradient of its result to per-example gradients of its parameter.

One function a kind of operation, by the name of its backward. Whether a rule was right is not taken on trust: the
engine compares whole gradients of single examples with those of a backward pass.

Shapes: N = examples, T = positions of an example, R = rows (examples and positions merged), G = groups.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from instruments.samples.axes import ExampleAxis
from instruments.samples.factors import Convolved, Direct, Factor, Lookup
from instruments.samples.graph import Use
from instruments.samples.outer import Outer

Rule = Callable[[Use, ExampleAxis, Tensor], Factor | None]
"""(use, where the examples are in the gradient of the result, that gradient) -> factor; None where it does not fit."""


def mm(use: Use, axis: ExampleAxis, delta: Tensor) -> Factor | None:
    """result = left @ right; the parameter is one of them."""
    addmm = use.name.startswith("Addmm")
    left, right = ("_saved_mat1", "_saved_mat2") if addmm else ("_saved_self", "_saved_mat2")
    if addmm:
        delta = _times(delta, use.node._saved_alpha)
    if use.slot == (2 if addmm else 1):
        return _product(use, axis, getattr(use.node, left), delta) if axis.dim == 0 else None
    if axis.dim != 1:
        return None
    turned = ExampleAxis(0, axis.examples, axis.inner)
    return _product(use, turned, delta.mT, getattr(use.node, right).mT)


def addmm(use: Use, axis: ExampleAxis, delta: Tensor) -> Factor | None:
    """result = beta * bias + alpha * left @ right."""
    if use.slot == 0:
        return broadcast(use, axis, _times(delta, use.node._saved_beta))
    return mm(use, axis, delta)


def _times(delta: Tensor, scale: float) -> Tensor:
    return delta if scale == 1 else delta * scale


def bmm(use: Use, axis: ExampleAxis, delta: Tensor) -> Factor | None:
    """A matrix product for each of G groups; the parameter is the right factor, (G, p, q)."""
    if use.slot != 1 or axis.dim != 1:
        return None
    rows = ExampleAxis(0, axis.examples, axis.inner)
    a_NGTp, b_NGTq = (rows.merged(t.movedim(1, 0), 2).movedim(2, 1) for t in (use.node._saved_self, delta))
    return Outer(a_NGTp, b_NGTq, use.shape)


def _product(use: Use, axis: ExampleAxis, a_Rp: Tensor, b_Rq: Tensor) -> Outer:
    first, second = (b_Rq, a_Rp) if use.flipped else (a_Rp, b_Rq)
    return Outer(axis.merged(first, 1).unsqueeze(1), axis.merged(second, 1).unsqueeze(1), use.shape)


def broadcast(use: Use, axis: ExampleAxis, product: Tensor) -> Factor | None:
    """The parameter was broadcast over the examples: sum over all other dimensions along which it was."""
    shape = (1,) * (product.ndim - len(use.shape)) + tuple(use.shape)
    if product.ndim < len(use.shape) or shape[axis.dim] != 1:
        return None
    if axis.dim == 0 and axis.inner == 1 and product.shape[1:] == use.shape and len(product) == axis.examples:
        return Direct(product)  # one position an example
    g = axis.first(product)  # (N, *before, outer, inner, *after)
    spread = (*shape[: axis.dim], 1, 1, *shape[axis.dim + 1 :])
    summed = [d + 1 for d, size in enumerate(spread) if size == 1]
    return Direct(g.sum(summed).reshape(len(g), *use.shape))


def add(use: Use, axis: ExampleAxis, delta: Tensor) -> Factor | None:
    """self + alpha * other."""
    return broadcast(use, axis, delta if use.slot == 0 else _times(delta, use.node._saved_alpha))


def sub(use: Use, axis: ExampleAxis, delta: Tensor) -> Factor | None:
    """self - alpha * other."""
    return broadcast(use, axis, delta if use.slot == 0 else delta * -use.node._saved_alpha)


def mul(use: Use, axis: ExampleAxis, delta: Tensor) -> Factor | None:
    """self * other."""
    return broadcast(use, axis, delta * (use.node._saved_other if use.slot == 0 else use.node._saved_self))


def div(use: Use, axis: ExampleAxis, delta: Tensor) -> Factor | None:
    """self / other, for a parameter as self."""
    return broadcast(use, axis, delta / use.node._saved_other) if use.slot == 0 else None


def convolution(use: Use, axis: ExampleAxis, delta: Tensor) -> Factor | None:
    """Any dimension, stride, padding, dilation, groups; transposed or not."""
    node = use.node
    if axis.dim != 0:
        return None
    if use.slot == 2:
        return Direct(axis.merged(delta.flatten(2).sum(2), 1).sum(1))
    inputs, deltas = (axis.merged(t, t.ndim - 1) for t in (node._saved_input, delta))
    settings = (
        node._saved_stride, node._saved_padding, node._saved_dilation, node._saved_transposed,
        node._saved_output_padding,
    )  # fmt: skip
    return Convolved(inputs, deltas, use.shape, node._saved_groups, settings)


def embedding(use: Use, axis: ExampleAxis, delta: Tensor) -> Factor | None:
    """Rows of a table by index; a row for padding has no gradient. Counts over the batch are no single example's."""
    node = use.node
    if node._saved_scale_grad_by_freq or axis.dim >= delta.ndim - 1:
        return None
    row_NT = axis.merged(node._saved_indices.unsqueeze(-1), 1).squeeze(-1)
    grads_NTq = axis.merged(delta, 1)
    padding = node._saved_padding_idx
    return _lookup(row_NT, grads_NTq, use.shape, padding if padding < 2**62 else -1)


def _lookup(row_NT: Tensor, grads_NTq: Tensor, shape: tuple[int, ...], padding: int) -> Lookup:
    n = len(row_NT)
    example_U = torch.arange(n, device=row_NT.device).repeat_interleave(row_NT.shape[1])
    row_U, grads_Uq = row_NT.reshape(-1), grads_NTq.reshape(-1, grads_NTq.shape[-1])
    if padding >= 0:
        kept_U = row_U != padding
        example_U, row_U, grads_Uq = example_U[kept_U], row_U[kept_U], grads_Uq[kept_U]
    return Lookup(example_U, row_U, grads_Uq, n, shape)


def embedding_bag(use: Use, axis: ExampleAxis, delta: Tensor) -> Factor | None:
    """Sums or means of rows; the maximum is left to other engines."""
    node = use.node
    offsets, indices = node._saved_offsets, node._saved_indices
    if use.slot != 0 or node._saved_mode == 2 or node._saved_scale_grad_by_freq or axis.dim != 0:
        return None
    bag_U = torch.bucketize(torch.arange(len(indices), device=indices.device), offsets, right=True) - 1
    kept_U = indices != (node._saved_padding_idx if node._saved_padding_idx < 2**62 else -1)
    grads_Uq = delta[bag_U]
    if node._saved_per_sample_weights is not None:
        grads_Uq = grads_Uq * node._saved_per_sample_weights.unsqueeze(1)
    if node._saved_mode == 1:
        sizes = torch.zeros(len(delta), dtype=delta.dtype, device=delta.device).index_add_(0, bag_U, kept_U.to(delta))
        grads_Uq = grads_Uq / sizes.clamp(min=1)[bag_U].unsqueeze(1)
    order = axis.merged(torch.arange(len(delta), device=delta.device).unsqueeze(1), 1).squeeze(-1)
    example_R = torch.empty(len(delta), dtype=torch.long, device=delta.device)
    example_R[order] = torch.arange(axis.examples, device=delta.device).unsqueeze(1).expand_as(order)
    return Lookup(example_R[bag_U][kept_U], indices[kept_U], grads_Uq[kept_U], axis.examples, use.shape)


def layer_norm(use: Use, axis: ExampleAxis, delta: Tensor) -> Factor | None:
    """(x - mean) / deviation * weight + bias over the last dimensions."""
    node = use.node
    if use.slot == 2:
        return broadcast(use, axis, delta)
    return broadcast(use, axis, delta * (node._saved_input - node._saved_result1) * node._saved_result2)


def group_norm(use: Use, axis: ExampleAxis, delta: Tensor) -> Factor | None:
    """The same over groups of channels; weight and bias a channel."""
    node = use.node
    if use.slot == 2:
        return _channels(axis, delta)
    grouped = (node._saved_N, node._saved_group, -1)
    mean, scale = (t.reshape(node._saved_N, node._saved_group, 1) for t in (node._saved_result1, node._saved_result2))
    normed = ((node._saved_input.reshape(grouped) - mean) * scale).reshape(delta.shape)
    return _channels(axis, delta * normed)


def batch_norm(use: Use, axis: ExampleAxis, delta: Tensor) -> Factor | None:
    """With the running statistics only: those of the batch mix the examples."""
    node = use.node
    if node._saved_training:
        return None
    if use.slot == 2:
        return _channels(axis, delta)
    shape = (1, -1) + (1,) * (delta.ndim - 2)
    scale = (node._saved_running_var + node._saved_eps).rsqrt().reshape(shape)
    return _channels(axis, delta * (node._saved_input - node._saved_running_mean.reshape(shape)) * scale)


def _channels(axis: ExampleAxis, product: Tensor) -> Factor | None:
    """Sum over positions, a value for each channel (dimension 1)."""
    if axis.dim != 0:
        return None
    return Direct(axis.merged(product.flatten(2).sum(2) if product.ndim > 2 else product, 1).sum(1))


def expand(use: Use, axis: ExampleAxis, delta: Tensor) -> Factor | None:
    """A parameter expanded to one copy an example, such as a class token."""
    return broadcast(use, axis, delta)


RULES: Mapping[str, Rule] = {
    "AddmmBackward0": addmm,
    "MmBackward0": mm,
    "BmmBackward0": bmm,
    "AddBackward0": add,
    "SubBackward0": sub,
    "MulBackward0": mul,
    "DivBackward0": div,
    "ConvolutionBackward0": convolution,
    "EmbeddingBackward0": embedding,
    "EmbeddingBagBackward0": embedding_bag,
    "NativeLayerNormBackward0": layer_norm,
    "NativeGroupNormBackward0": group_norm,
    "NativeBatchNormBackward0": batch_norm,
    "ExpandBackward0": expand,
}


def _full(made: Factor) -> Factor:
    """Half precision made single: squares of gradients underflow in float16 and keep three digits in bfloat16."""
    tensors = {name: t for name, t in vars(made).items() if isinstance(t, Tensor) and t.is_floating_point()}
    half = {name: t.float() for name, t in tensors.items() if t.dtype.itemsize < 4}
    return replace(made, **half) if half else made  # type: ignore[type-var]


def factor(use: Use, axis: ExampleAxis, delta: Tensor) -> Factor | None:
    """The rule of the operation applied, or None where there is none or a tensor that it needs was not saved."""
    rule = RULES.get(use.name)
    if rule is None:
        return None
    try:
        made = rule(use, axis, delta)
        return None if made is None else _full(made)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, TypeError, RuntimeError, ValueError, IndexError):
        return None
