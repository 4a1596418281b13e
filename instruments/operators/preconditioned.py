"""The Hessian as an optimizer sees it: D^1/2 (H + diag c) D^1/2."""

from collections.abc import Sequence

import torch
from torch import Tensor

from instruments.operators.operator import Operator


class PreconditionedOperator(Operator):
    """D^1/2 (H + diag c) D^1/2 for a diagonal step size D >= 0 and coupled decay c, both of shape (D,).

    It has the eigenvalues of D (H + diag c); a right eigenvector of that is D^1/2 y for an eigenvector y of this.
    Coordinates with D = 0 are not trained and have rows of zeros.
    """

    def __init__(self, hessian: Operator, scale_D: Tensor, decay_D: Tensor) -> None:
        self._hessian, self._decay_D = hessian, decay_D
        self._root_D = torch.sqrt(scale_D)
        self.size, self.dtype, self.device = hessian.size, hessian.dtype, hessian.device
        self.price, self.route = hessian.price, hessian.route

    def matvec(self, v_D: Tensor) -> Tensor:
        w_D = self._root_D * v_D
        return self._root_D * (self._hessian.matvec(w_D) + self._decay_D * w_D)

    def known(self) -> Sequence[tuple[Tensor, Tensor]]:
        """Those of the Hessian: w = D^1/2 v has v = D^-1/2 w, where every coordinate is trained."""
        pairs = self._hessian.known()
        if not pairs or not bool((self._root_D > 0).all()):
            return ()
        return [(w_D / self._root_D, self._root_D * (hw_D + self._decay_D * w_D)) for w_D, hw_D in pairs]
