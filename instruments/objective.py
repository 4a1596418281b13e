"""The loss that is trained, taken apart into examples.

Every loss is read as  loss = total / denominator,  total = sum of one number an example:

    mean over elements        denominator = number of elements
    class-weighted mean       denominator = sum of the weights of the targets that count (ignored targets weigh 0)
    mean over the batch       denominator = number of examples
    sum                       denominator = 1

so that the gradient of example i, in the unit of the loss, is g_i = (N / denominator) * grad of its own sum, and
mean(g_i) is the gradient of the loss for every reduction.

Shapes: N = examples of a batch (its leading dimension).
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from instruments.refusal import Refusal

Batch = Any
Call = Callable[..., Any]
Losses = Callable[[Call, Batch], Tensor]


@dataclass(frozen=True)
class Parts:
    """One evaluation of the loss on one batch. `sums_N` is None when the user's loss is a single number."""

    total: Tensor
    denominator: Tensor | float
    examples: int
    sums_N: Tensor | None

    @property
    def loss(self) -> Tensor:
        return self.total / self.denominator

    def detached(self) -> "Parts":
        """Without the graph."""
        weight, sums_N = self.denominator, self.sums_N
        return Parts(
            self.total.detach(),
            weight.detach() if isinstance(weight, Tensor) else weight,
            self.examples,
            None if sums_N is None else sums_N.detach(),
        )


class Objective(ABC):
    """Abstract: evaluates the training loss of a batch through `call`, the model's forward."""

    @abstractmethod
    def parts(self, call: Call, batch: Batch) -> Parts:
        """The loss of this batch, by example."""

    pooled_by_denominator: bool = True
    """Whether several batches are one loss by adding totals and denominators (a mean), not by averaging (a sum)."""
    pure: bool = False
    """Whether it is known to draw no random number and to write nowhere."""


def as_objective(loss: nn.Module | Losses | Objective) -> Objective:
    """An nn loss module on (inputs, targets), or a function `losses(call, batch) -> losses_N`, as an Objective."""
    if isinstance(loss, Objective):
        return loss
    if isinstance(loss, nn.CTCLoss):
        raise ValueError(
            "expected a loss on (outputs, targets), got CTCLoss, which needs lengths too; pass a function "
            "losses(call, batch) that returns one loss an example."
        )
    if isinstance(loss, nn.Module):
        return ModuleObjective(loss)
    if getattr(loss, "__module__", "") == "torch.nn.functional":
        raise ValueError(
            f"expected an nn loss module or a function losses(call, batch), got F.{getattr(loss, '__name__', loss)}; "
            "pass the module of the same name, for example nn.CrossEntropyLoss()."
        )
    if callable(loss):
        return FunctionObjective(loss)
    raise ValueError(f"expected an nn loss module or a function losses(call, batch) -> losses_N, got {loss!r}.")


class ModuleObjective(Objective):
    """A loss module such as `nn.CrossEntropyLoss(weight=..., ignore_index=...)` applied to (model(inputs), targets).

    The module itself is not changed: a shallow copy with reduction "none" gives the elements.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._reduction = getattr(module, "reduction", None)
        self._elements = copy.copy(module)
        if self._reduction is not None:
            setattr(self._elements, "reduction", "none")  # noqa: B010  (nn.Module types its attributes as tensors)
        self.pooled_by_denominator = self._reduction != "sum"
        self.pure = type(module).__module__ == "torch.nn.modules.loss"

    def parts(self, call: Call, batch: Batch) -> Parts:
        inputs, targets = _pair(batch)
        outputs = call(inputs)
        elements = self._elements(outputs, targets)
        if elements.ndim == 0:
            return Parts(elements, 1.0, examples_of(batch), None)
        sums_N = elements.reshape(elements.shape[0], -1).sum(1)
        return Parts(sums_N.sum(), self._denominator(elements, targets), elements.shape[0], sums_N)

    def _denominator(self, elements: Tensor, targets: Tensor) -> Tensor | float:
        if self._reduction == "sum":
            return 1.0
        if self._reduction in ("batchmean", None):
            return float(elements.shape[0])
        if isinstance(self._module, nn.CrossEntropyLoss | nn.NLLLoss) and not targets.is_floating_point():
            counted = targets != self._module.ignore_index
            if self._module.weight is None:
                return counted.sum().to(elements.dtype)
            weights = self._module.weight[torch.where(counted, targets, 0)]
            return (weights * counted).sum()
        return float(elements.numel())


class FunctionObjective(Objective):
    """`losses(call, batch)`: losses_N (their mean is the loss), or one number, which has curvature but no examples."""

    def __init__(self, losses: Losses) -> None:
        self._losses = losses

    def parts(self, call: Call, batch: Batch) -> Parts:
        losses = self._losses(call, batch)
        if not isinstance(losses, Tensor):
            raise Refusal(f"expected the loss function to return a tensor, got {type(losses).__name__}.")
        if losses.ndim == 0:
            return Parts(losses, 1.0, examples_of(batch), None)
        sums_N = losses.reshape(losses.shape[0], -1).mean(1)
        return Parts(sums_N.sum(), float(losses.shape[0]), losses.shape[0], sums_N)


def _pair(batch: Batch) -> tuple[Any, Tensor]:
    if isinstance(batch, Sequence) and len(batch) == 2:
        return batch[0], batch[1]
    shape = f"keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
    raise Refusal(
        f"expected a batch (inputs, targets) for a loss module, got {shape}; "
        "pass loss as a function losses(call, batch) -> losses_N that knows this batch."
    )


def plain_tree(batch: Batch) -> Any:
    """The batch with mappings that torch does not know (such as a tokenizer's) as plain dictionaries."""
    return dict(batch) if isinstance(batch, Mapping) else batch


def tensors_of(batch: Batch) -> list[Tensor]:
    """The tensors in a batch of any nesting of tuples, lists and dictionaries."""
    leaves = tree_leaves(plain_tree(batch))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def examples_of(batch: Batch) -> int:
    """Examples in a batch: the leading dimension of its first tensor, or the length of a list of ragged tensors.

    Ragged means of different lengths: loaders also give lists of fields, whose leading dimensions agree.
    """
    sized = [t for t in tensors_of(batch) if t.ndim]
    if isinstance(batch, list) and len(sized) == len(batch) and len({len(t) for t in sized}) > 1:
        return len(batch)
    first = sized[0] if sized else None
    return 0 if first is None else first.shape[0]


def bytes_of(batch: Batch) -> int:
    return sum(t.numel() * t.element_size() for t in tensors_of(batch))


def clone_of(batch: Batch) -> Batch:
    """A copy that the user's loop cannot overwrite (loaders with a pinned buffer do)."""
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, plain_tree(batch))


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, plain_tree(batch))


def addends(objective: Objective, parts: Parts) -> tuple[Tensor, Tensor | float]:
    """(total, weight) such that several batches are one loss sum(total) / sum(weight).

    A mean loss adds totals and denominators (tokens that count, class weights); a summed loss, or a single number,
    averages over batches by their examples.
    """
    if objective.pooled_by_denominator and parts.sums_N is not None:
        weight = parts.denominator
        return parts.total, weight.detach() if isinstance(weight, Tensor) else weight
    return parts.loss * parts.examples, float(parts.examples)


def pooled_loss(objective: Objective, parts: Sequence[Parts]) -> Tensor:
    """The loss of several batches as one."""
    totals, weights = zip(*(addends(objective, p) for p in parts), strict=True)
    return torch.as_tensor(sum(totals) / sum(weights))


def losses_by_example(parts: Sequence[Parts]) -> Tensor:
    """(N,): the loss of each example of several batches, in a unit in which their mean is the loss of all of them.

    Raises Refusal where the user's loss is a single number.
    """
    sums = [part.sums_N for part in parts if part.sums_N is not None]
    if len(sums) < len(parts):
        raise no_examples()
    sums_N = torch.cat(sums)
    return sums_N * (len(sums_N) / sum((part.denominator for part in parts), start=0.0))


class Undefined(Refusal):
    """No example has a loss or a gradient of its own: nobody can help."""


def no_examples() -> Undefined:
    """The refusal of whatever needs single examples of a loss that is one number."""
    return Undefined(
        "the loss is a single number, so examples cannot be told apart; "
        "return losses_N, one loss an example, from the loss function."
    )
