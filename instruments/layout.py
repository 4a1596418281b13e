"""Between a model's parameters and the flat vector that linear algebra works on.

Shapes: D = number of trainable scalars, each parameter counted once however many modules share it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from instruments.refusal import Refusal


@dataclass(frozen=True)
class Layout:
    """The trainable parameters in the order of `model.named_parameters()`, and the vector v_D over them.

    The vector is float64 when any parameter is, else float32: half-precision parameters have their curvature computed
    in their own precision, but sums over them are not.
    """

    names: tuple[str, ...]
    params: tuple[Tensor, ...]

    @classmethod
    def of(cls, model: nn.Module) -> "Layout":
        """Tied weights appear once, under the first of their names; frozen parameters do not appear."""
        pairs = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not pairs:
            raise ValueError(
                "expected a model with trainable parameters, got one where none requires a gradient; "
                "set requires_grad on what is trained. Nothing can be measured without it."
            )
        return cls(tuple(name for name, _ in pairs), tuple(p for _, p in pairs))

    @cached_property
    def size(self) -> int:
        return sum(p.numel() for p in self.params)

    @cached_property
    def dtype(self) -> torch.dtype:
        return torch.float64 if any(p.dtype == torch.float64 for p in self.params) else torch.float32

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    def join(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """One vector v_D from one tensor a parameter; None is zero, sparse is made dense. Complex ones are refused."""
        if any(p.is_complex() for p in self.params):
            raise Refusal("complex parameters have no vector of real numbers here; readings of them are not supported.")
        pieces = [
            torch.zeros(p.numel(), dtype=self.dtype, device=self.device) if t is None else self._dense(t)
            for p, t in zip(self.params, tensors, strict=True)
        ]
        return torch.cat(pieces)

    def split(self, v_D: Tensor) -> list[Tensor]:
        """Views of v_D in the shape of each parameter, cast to its dtype and device where these differ."""
        pieces = torch.split(v_D, [p.numel() for p in self.params])
        return [piece.view(p.shape).to(p) for piece, p in zip(pieces, self.params, strict=True)]

    def _dense(self, t: Tensor) -> Tensor:
        t = t.to_dense() if t.layout is not torch.strided else t
        return t.reshape(-1).to(device=self.device, dtype=self.dtype)


def total_norm(tensors: Sequence[Tensor | None]) -> Tensor:
    """Euclidean norm of a list of tensors as one vector, by one fused pass and no synchronisation."""
    present = [t if t.layout is torch.strided else t.coalesce().values() for t in tensors if t is not None]
    if not present:
        raise Refusal("no parameter has a gradient; observe() belongs after backward() and before zero_grad().")
    norm: Tensor = torch.linalg.vector_norm(norms_of(present))
    return norm


def norms_of(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of each tensor, shape (number of tensors,), by one fused pass and no synchronisation."""
    plain = [t.detach() for t in tensors]
    norms = torch._foreach_norm(plain, dtype=torch.float32 if _half(plain) else None)
    return torch.stack([n.to(plain[0].device) for n in norms])


def _half(tensors: Sequence[Tensor]) -> bool:
    return any(t.dtype in (torch.float16, torch.bfloat16) for t in tensors)
