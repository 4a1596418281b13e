"""The Hessian by double backward, and by differences of the gradient where that turns out to be impossible."""

from collections.abc import Sequence

import torch
from torch import Tensor

from instruments.layout import Layout
from instruments.operators.finite_difference import FiniteDifferenceOperator
from instruments.operators.hessian import Context, HessianOperator, Piece
from instruments.operators.operator import Operator, random_unit

ASYMMETRY = 0.05
"""Of |u'Hv - v'Hu| against what |u'Hv| is for random unit vectors, |Hv| / sqrt(D); rounding leaves 1e-4 of it."""


class LastResortHessian(Operator):
    """Products by `HessianOperator` until PyTorch says that something has no second derivative.

    From then on all of them are central differences; `route` says so, with the reason, and `error` is the estimated
    relative error of a product (None while double backward works).

    A part that cannot be differentiated twice does not always raise: an operation whose backward is opaque leaves its
    share of the product out. `checked=False` looks for that, by the symmetry of two products (their price is 4 g).
    """

    def __init__(
        self, pieces: Sequence[Piece], layout: Layout, *, keep_graphs: bool, context: Context, checked: bool = True
    ) -> None:
        self._pieces, self._layout, self._context = pieces, layout, context
        self._operator: HessianOperator | FiniteDifferenceOperator = HessianOperator(
            pieces, layout, keep_graphs=keep_graphs, context=context
        )
        self.size, self.dtype, self.device = layout.size, layout.dtype, layout.device
        self.error: float | None = None
        if not checked:
            self._check()

    @property
    def price(self) -> float:  # type: ignore[override]
        return self._operator.price

    @property
    def route(self) -> str:  # type: ignore[override]
        return self._operator.route

    @property
    def gradient_D(self) -> Tensor:
        """Gradient of the same loss, shape (D,)."""
        return self._operator.gradient_D

    def matvec(self, v_D: Tensor) -> Tensor:
        if self.error is None:
            try:
                return self._operator.matvec(v_D)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._give_up(error, v_D)
        return self._operator.matvec(v_D)

    def release(self) -> None:
        """Free the graphs; the operator cannot be used afterwards."""
        self._operator.release()
        self._pieces = []

    def _check(self) -> None:
        u_D, v_D = (random_unit(self, seed) for seed in (0, 1))
        left_D, right_D = self.matvec(u_D), self.matvec(v_D)
        if self.error is not None:
            return
        difference = (torch.dot(left_D, v_D) - torch.dot(right_D, u_D)).abs()
        if bool(difference > ASYMMETRY * (left_D.norm() + right_D.norm()) / self.size**0.5):
            self._give_up(RuntimeError("its products are not symmetric, a part has no second derivative"), u_D)

    def _give_up(self, error: Exception, v_D: Tensor) -> None:
        self._operator.release()
        differences = FiniteDifferenceOperator(self._pieces, self._layout, context=self._context)
        reason = str(error).strip().splitlines()[0][:120]
        differences.route += f", since double backward failed: {reason}"
        self._operator, self.error = differences, differences.error(v_D)
