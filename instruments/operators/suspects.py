"""What in a graph may spoil its second derivative, found by walking it once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from instruments.reentrant import nodes

LONG = 1024.0  # by how much a vector is stretched to see whether a hook limits it


@dataclass(frozen=True)
class Suspects:
    """`opaque`: an autograd.Function of the user's, whose backward may have no derivative. `precision`: the coarsest
    floating type that is computed in.
    """

    opaque: bool
    precision: torch.dtype

    @property
    def half(self) -> bool:
        """Whether some of it is computed with fewer digits than float32: half parameters, autocast in the forward."""
        return torch.finfo(self.precision).eps > torch.finfo(torch.float32).eps


def suspects(outputs: Sequence[Tensor], params: Sequence[Tensor]) -> Suspects:
    """Of the graph below these outputs."""
    types, opaque = {p.dtype for p in params}, False
    for output in outputs:
        for node in nodes(output):
            opaque = opaque or isinstance(node, torch.autograd.function.BackwardCFunction)
            types.update(meta.dtype for meta in getattr(node, "_input_metadata", ()))
    floating = [t for t in types if t.is_floating_point]
    return Suspects(opaque, max(floating, key=lambda t: torch.finfo(t).eps))


def hooked_beyond_masks(params: Sequence[Tensor]) -> bool:
    """Whether a hook on a parameter does more to its gradient than to mask it.

    Two backward passes meet it twice. For a mask, twice is once: the product is that of the matrix with masked rows and
    columns.
    """
    for p in params:
        if p._backward_hooks:
            v = torch.randn(p.shape, generator=torch.Generator().manual_seed(0)).to(p)
            once = _hooked(p, v)
            if not torch.allclose(_hooked(p, LONG * once), LONG * once):
                return True
    return False


def _hooked(p: Tensor, grad: Tensor) -> Tensor:
    for hook in (p._backward_hooks or {}).values():
        changed = hook(grad)
        grad = grad if changed is None else changed
    return grad
