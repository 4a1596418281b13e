"""An orthonormal basis of the parameters in which a preconditioner is diagonal.

Shapes: D = trainable scalars.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

TOLERANCE = 1e-3  # on Q'Q - I, for bases kept in half precision or by approximate decompositions


@dataclass(frozen=True)
class Rotation:
    """Q = Q_1 (x) Q_2 (x) ... on one parameter, seen in the given shape: the columns of each Q_k are the basis of
    dimension k, None stands for the identity."""

    shape: tuple[int, ...]
    matrices: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, name: str, step_size: Tensor, numel: int, basis: Sequence[Tensor | None]) -> "Rotation":
        """Raises ValueError unless there is one orthonormal matrix or None for each dimension of `step_size`."""
        shape, sizes = tuple(step_size.shape), [None if q is None else tuple(q.shape) for q in basis]
        fits = step_size.numel() == numel and len(sizes) == len(shape)
        if not (fits and all(s in (None, (n, n)) for s, n in zip(sizes, shape, strict=False))):
            raise ValueError(
                f"expected for {name} ({numel} scalars) a step_size of as many scalars and, in the basis, a square "
                f"matrix or None for each of its dimensions; got shape {shape} and matrices {sizes}."
            )
        for q in basis:
            if q is not None and float((q.T @ q - torch.eye(len(q)).to(q)).abs().max()) > TOLERANCE:
                raise ValueError(
                    f"expected orthonormal columns in the basis of {name}, got a matrix with Q'Q off the identity by "
                    f"more than {TOLERANCE:g}; pass eigenvectors. Otherwise rho would be that of another matrix."
                )
        return cls(shape, tuple(basis))

    def into(self, t: Tensor) -> Tensor:
        """Q't, the coordinates of t."""
        return self._along_all(t, 0)

    def back(self, t: Tensor) -> Tensor:
        """Qt."""
        return self._along_all(t, 1)

    def _along_all(self, t: Tensor, contracted: int) -> Tensor:
        x = t.reshape(self.shape)
        for q in self.matrices:  # each turn moves the dimension that is first to the end
            x = x.movedim(0, -1) if q is None else torch.tensordot(x, q.to(x), dims=([0], [contracted]))
        return x.reshape(t.shape)


@dataclass(frozen=True)
class Basis:
    """Rotations by the number of the parameter; the other parameters keep their own coordinates.

    `sizes` are the scalars of each parameter. Without a rotation vectors are passed through, not copied.
    """

    sizes: tuple[int, ...] = ()
    rotations: Mapping[int, Rotation] = field(default_factory=dict)

    def into(self, v_D: Tensor) -> Tensor:
        """Q'v."""
        if not self.rotations:
            return v_D
        pieces = enumerate(torch.split(v_D, list(self.sizes)))
        return torch.cat([self.rotations[i].into(v) if i in self.rotations else v for i, v in pieces])

    def back(self, v_D: Tensor) -> Tensor:
        """Qv."""
        if not self.rotations:
            return v_D
        pieces = enumerate(torch.split(v_D, list(self.sizes)))
        return torch.cat([self.rotations[i].back(v) if i in self.rotations else v for i, v in pieces])
