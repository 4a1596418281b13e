"""The gradients as they stood at observe, and whether anybody has written to them since.

A second norm of all gradients at every step would cost as much as the first. It is taken only where something changed:

- a gradient is another tensor object, or its version counter moved: certain. `clip_grad_norm_`, `clip_grad_value_` and
  in-place operations move the counter, whether or not the values changed; assigning to `p.grad` replaces the object.
- `p.grad.data.mul_(c)`, a NumPy view or a GradScaler's `unscale_` write past the counter: noticed by a sample of about
  a thousand elements, compared with the loss scale taken out.

Only a write past the counter that spares every sampled element goes unnoticed. Small models and sparse gradients have
no sample: their norm is taken again at every step.

Shapes: S = sampled elements.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from instruments.layout import total_norm

CLIP_TOLERANCE = 1e-3
SMALL = 2**18  # elements whose norm costs no more than a sample
SAMPLED_TENSORS, SAMPLED_ELEMENTS = 16, 64  # of each tensor


@dataclass(frozen=True)
class GradientMark:
    """`norm` and `sample_S` are those of the unscaled gradients at observe; without a sample the norm decides alone."""

    params: tuple[Tensor, ...]
    grads: tuple[Tensor | None, ...]
    versions: tuple[int, ...]
    norm: Tensor
    sample_S: Tensor | None

    @classmethod
    @torch.no_grad()
    def of(cls, params: tuple[Tensor, ...], norm: Tensor, scale: float) -> "GradientMark":
        """What stands in `.grad` now, whose norm without the loss scale is known."""
        grads = tuple(p.grad for p in params)
        return cls(params, grads, _versions(grads), norm, _sample(grads) / scale if _worth_a_sample(grads) else None)

    @torch.no_grad()
    def clipped(self, scale: float) -> tuple[float, float] | None:
        """The norms before and after, where the gradient is now shorter by more than one part in a thousand.

        Waits for the device once when nothing was written, twice otherwise. Raises Refusal when no gradient is left.
        """
        grads = tuple(p.grad for p in self.params)
        if not self._written(grads) and self._same_sample(grads, scale):
            return None
        after = total_norm(grads) / scale
        norms: list[float] = torch.stack([self.norm, after.to(self.norm)]).tolist()
        return (norms[0], norms[1]) if norms[1] < norms[0] * (1 - CLIP_TOLERANCE) else None

    def _written(self, grads: Sequence[Tensor | None]) -> bool:
        others = any(now is not before for now, before in zip(grads, self.grads, strict=True))
        return others or _versions(grads) != self.versions

    def _same_sample(self, grads: Sequence[Tensor | None], scale: float) -> bool:
        """A sample of zeros proves nothing (scaled, it is the same), and one with infinities is never the same."""
        if self.sample_S is None:
            return False
        now_S, before_S = _sample(grads) / scale, self.sample_S
        close_S = (now_S - before_S).abs() <= before_S * (CLIP_TOLERANCE / 2)
        return bool(close_S.all() & before_S.any())


def _versions(grads: Sequence[Tensor | None]) -> tuple[int, ...]:
    return tuple(0 if g is None or g.is_inference() else g._version for g in grads)


def _worth_a_sample(grads: Sequence[Tensor | None]) -> bool:
    present = [g for g in grads if g is not None]
    return all(g.layout is torch.strided for g in present) and sum(g.numel() for g in present) > SMALL


def _sample(grads: Sequence[Tensor | None]) -> Tensor:
    """Sizes of elements at fixed places of some of the gradients, without a copy of any gradient."""
    present = [g for g in grads if g is not None and g.numel()]
    chosen = present[:: math.ceil(len(present) / SAMPLED_TENSORS)]
    return torch.cat([_some(g).abs().to(chosen[0].device, torch.float32) for g in chosen])


def _some(g: Tensor) -> Tensor:
    per_dimension = max(1, int(SAMPLED_ELEMENTS ** (1 / max(1, g.ndim))))
    return g.detach()[tuple(slice(None, None, math.ceil(size / per_dimension)) for size in g.shape)].flatten()
