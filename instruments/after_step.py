"""What readings after the step share: sums by parameter group, learning rates, and the gradient that was used.

Shapes: L = trained parameter tensors, G = parameter groups of all optimizers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, optim

from instruments.refusal import Refusal
from instruments.view import View


@dataclass(frozen=True)
class Groups:
    """Parameter groups of all optimizers in order: `number_L` is the group of each trained tensor, -1 for none."""

    settings: tuple[dict[str, Any], ...]
    number_L: Tensor

    @classmethod
    def of(cls, view: View) -> "Groups":
        """The instrument declares "groups"."""
        settings = tuple(group for optimizer in view.optimizers for group in optimizer.param_groups)
        number = {id(p): i for i, group in enumerate(settings) for p in group["params"]}
        numbers = [number.get(id(p), -1) for p in view.layout.params]
        return cls(settings, torch.tensor(numbers, device=view.layout.device))

    def add(self, values_L: Tensor) -> Tensor:
        """(G,): sum over the tensors of each group, NaN for a group without a trained one."""
        return self._reduce(values_L, "sum")

    def largest(self, values_L: Tensor) -> Tensor:
        """(G,): the largest of each group, NaN for a group without a trained tensor."""
        return self._reduce(values_L, "amax")

    def _reduce(self, values_L: Tensor, how: str) -> Tensor:
        held_L = self.number_L >= 0
        empty_G = values_L.new_full((len(self.settings),), float("nan"))
        return empty_G.scatter_reduce(0, self.number_L[held_L], values_L[held_L], reduce=how, include_self=False)

    def rates(self, like: Tensor) -> Tensor:
        """(G,): learning rate of each group. Raises Refusal where a group has none."""
        if any("lr" not in group for group in self.settings):
            raise Refusal("a parameter group of the optimizer has no 'lr', by which its step could be divided.")
        return like.new_tensor([float(group["lr"]) for group in self.settings])


def used_gradients(view: View) -> list[Tensor]:
    """What the optimizer found in `.grad`, clipped where it was clipped in place; a zero where there was none.

    Without the scale of a GradScaler, which has divided it by then. The instrument declares "gradient", "change" and
    "groups". Raises Refusal where `.grad` is another one after the step: torch's SGD with Nesterov momentum over lists
    of tensors adds the momentum to it, and an optimizer that is not torch's may divide a copy by the scale.
    """
    if any(map(_may_leave_the_scale, view.optimizers)):
        raise Refusal(
            "expected an optimizer of torch, which divides .grad by the scale of the GradScaler, got another one that "
            "takes the scale for itself and may leave it in; call scaler.unscale_(optimizer) before the step. "
            "Otherwise the norm after it could be off by the scale."
        )
    if any(isinstance(optimizer, optim.SGD) and _adds_to_grad(optimizer) for optimizer in view.optimizers):
        raise Refusal(
            "expected .grad to outlive the step, but SGD with Nesterov momentum adds the momentum to it in place when "
            "it works on lists of tensors; pass foreach=False to SGD. Otherwise that sum would be read as the gradient."
        )
    grads = [torch.zeros((), device=view.layout.device) if g is None else g for g in view.used_grads]
    return [g if g.layout is torch.strided else g.coalesce().values() for g in grads]


def _may_leave_the_scale(optimizer: optim.Optimizer) -> bool:
    """Whether the scaler has given its scale to a step that does not write back what it divides, as torch's fused ones
    do, Adagrad on a CPU only."""
    if getattr(optimizer, "grad_scale", None) is None:
        return False
    on_accelerator = any(p.device.type != "cpu" for group in optimizer.param_groups for p in group["params"])
    if isinstance(optimizer, optim.Adagrad) and on_accelerator:
        return True
    return not type(optimizer).step.__module__.startswith("torch.optim.")


def _adds_to_grad(optimizer: optim.SGD) -> bool:
    return any(group["nesterov"] and _over_lists(group) for group in optimizer.param_groups)


def _over_lists(group: dict[str, Any]) -> bool:
    """Whether torch steps on lists of tensors, its own choice on accelerators."""
    if group["foreach"] is not None:
        return bool(group["foreach"])
    return not group["fused"] and any(p.device.type != "cpu" for p in group["params"])
