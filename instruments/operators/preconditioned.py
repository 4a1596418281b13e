"""The Hessian as an optimizer sees it: D^1/2 (H + diag c) D^1/2.

Shapes: D = trainable scalars.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from instruments.operators.operator import Operator
from instruments.preconditioners.basis import Basis


class PreconditionedOperator(Operator):
    """R' (H + diag c) R with R = Q diag(d)^1/2, for step sizes d >= 0 in an orthonormal basis Q and coupled decay c.

    d and c have shape (D,). It has the eigenvalues of D (H + diag c), D = R R' = Q diag(d) Q'; a right eigenvector of
    that is R y for an eigenvector y of this. Without a basis Q = I and D is diagonal. Coordinates with d = 0 are not
    trained and have rows of zeros.
    """

    def __init__(self, hessian: Operator, scale_D: Tensor, decay_D: Tensor, basis: Basis | None = None) -> None:
        self._hessian, self._decay_D = hessian, decay_D
        self._root_D, self._basis = torch.sqrt(scale_D), basis or Basis()
        self.size, self.dtype, self.device = hessian.size, hessian.dtype, hessian.device
        self.price, self.route = hessian.price, hessian.route

    def matvec(self, v_D: Tensor) -> Tensor:
        w_D = self._basis.back(self._root_D * v_D)
        return self._image(w_D, self._hessian.matvec(w_D))

    def _image(self, w_D: Tensor, hw_D: Tensor) -> Tensor:
        """R' (H + C) w."""
        return self._root_D * self._basis.into(hw_D + self._decay_D * w_D)

    def known(self) -> Sequence[tuple[Tensor, Tensor]]:
        """Those of the Hessian, w = R v with v = R^-1 w, that are zero in coordinates which are not trained."""
        pairs = self._hessian.known()
        if not pairs:
            return ()
        still_D = self._root_D == 0
        outside_K = [False] * len(pairs)
        if bool(still_D.any()):
            outside_K = torch.stack([(self._basis.into(w_D) * still_D).any() for w_D, _ in pairs]).tolist()
        inverse_D = torch.where(still_D, 0.0, 1 / self._root_D)
        return [
            (self._basis.into(w_D) * inverse_D, self._image(w_D, hw_D))
            for (w_D, hw_D), outside in zip(pairs, outside_K, strict=True)
            if not outside
        ]
