"""Parts of a model's parameters: by layer, by parameter group of the optimizers, by pattern of names.

Shapes: D = trainable scalars, B = scalars of one block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, optim

from instruments.layout import Layout

ROOT = "(model)"
"""The layer of parameters that the model holds itself."""


@dataclass(frozen=True)
class Block:
    """Some whole parameters, as slices of the flat vector in ascending order; `size` is B, `whole` is D."""

    name: str
    slices: tuple[slice, ...]
    whole: int

    @property
    def size(self) -> int:
        return sum(s.stop - s.start for s in self.slices)

    def cut(self, v_D: Tensor) -> Tensor:
        """The coordinates of the block, shape (B,)."""
        return torch.cat([v_D[s] for s in self.slices])

    def pad(self, v_B: Tensor) -> Tensor:
        """v_B in its place, zeros elsewhere, shape (D,)."""
        v_D = torch.zeros(self.whole, dtype=v_B.dtype, device=v_B.device)
        for s, piece in zip(self.slices, torch.split(v_B, [s.stop - s.start for s in self.slices]), strict=True):
            v_D[s] = piece
        return v_D


def by_layer(layout: Layout) -> list[Block]:
    """One block for each module that holds parameters itself, in the order of the model: weight and bias together."""
    members: dict[str, list[int]] = {}
    for i, name in enumerate(layout.names):
        members.setdefault(name.rpartition(".")[0] or ROOT, []).append(i)
    return [_block(layout, name, indices) for name, indices in members.items()]


def by_group(layout: Layout, optimizers: Sequence[optim.Optimizer]) -> list[Block]:
    """One block for each parameter group of the optimizers in order, "group 0" first; groups without a trained
    parameter of the model are left out, the numbers of the others stay."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    index = {id(p): i for i, p in enumerate(layout.params)}
    found = [sorted(index[id(p)] for p in group["params"] if id(p) in index) for group in groups]
    return [_block(layout, f"group {k}", indices) for k, indices in enumerate(found) if indices]


def by_pattern(layout: Layout, patterns: Mapping[str, str] | Sequence[str]) -> list[Block]:
    """One block for each shell pattern of parameter names ("encoder.*.weight"), named by its key or by itself.

    Blocks may overlap. A pattern that fits no trained parameter is a mistake and raises ValueError.
    """
    if isinstance(patterns, str):
        patterns = [patterns]
    named = patterns if isinstance(patterns, Mapping) else {pattern: pattern for pattern in patterns}
    blocks = []
    for name, pattern in named.items():
        indices = [i for i, parameter in enumerate(layout.names) if fnmatchcase(parameter, pattern)]
        if not indices:
            known = ", ".join(layout.names[:8]) + (", ..." if len(layout.names) > 8 else "")
            raise ValueError(f"expected a pattern that fits a trained parameter, got {pattern!r}; there are {known}.")
        blocks.append(_block(layout, name, indices))
    return blocks


def _block(layout: Layout, name: str, indices: Sequence[int]) -> Block:
    """Neighbouring parameters share a slice."""
    ends = torch.tensor([0, *(p.numel() for p in layout.params)]).cumsum(0).tolist()
    slices: list[slice] = []
    for i in indices:
        if slices and slices[-1].stop == ends[i]:
            slices[-1] = slice(slices[-1].start, ends[i + 1])
        else:
            slices.append(slice(ends[i], ends[i + 1]))
    return Block(name, tuple(slices), layout.size)
