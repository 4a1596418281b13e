"""The Hessian by double backward, and by differences of the gradient where that turns out to be impossible."""

from collections.abc import Sequence

import torch
from torch import Tensor

from instruments.layout import Layout
from instruments.operators.finite_difference import FiniteDifferenceOperator
from instruments.operators.hessian import Context, HessianOperator, Piece
from instruments.operators.operator import Operator, random_unit

KNOWN_LEAST, KNOWN_MOST, KNOWN_SCALARS = 4, 12, 2**27
"""Products that are remembered for whoever reads the same matrix at this step: how many, and how much memory."""
ASYMMETRY = 0.05
"""Of |u'Hv - v'Hu| against what |u'Hv| is for random unit vectors, |Hv| / sqrt(D); rounding leaves 1e-4 of it."""
DIFFERENCE = 0.02
"""Of a product by double backward against differences, relative to its size."""


class LastResortHessian(Operator):
    """Products by `HessianOperator` until PyTorch says that something has no second derivative.

    From then on all of them are central differences; `route` says so, with the reason, and `error` is the estimated
    relative error of a product (None while double backward works).

    A part that cannot be differentiated twice does not always raise: an operation whose backward is opaque leaves its
    share of the product out. That is looked for once, by the symmetry of two products (their price is 4 g), unless
    `reason` says what was found before: "" for nothing, else why products are differences from the start. Afterwards
    the attribute `reason` says the same of this operator.
    """

    def __init__(
        self, pieces: Sequence[Piece], layout: Layout, *, keep_graphs: bool, context: Context, reason: str | None = None
    ) -> None:
        self._pieces, self._layout, self._context = pieces, layout, context
        self._operator: HessianOperator | FiniteDifferenceOperator
        self.size, self.dtype, self.device = layout.size, layout.dtype, layout.device
        self.error: float | None = None
        self.reason = reason or ""
        self._known: list[tuple[Tensor, Tensor]] = []
        self._room = 0
        if reason:
            self._use_differences(reason, random_unit(self, 0))
            return
        self._operator = HessianOperator(pieces, layout, keep_graphs=keep_graphs, context=context)
        if reason is None:
            self._check()
        self._room = max(KNOWN_LEAST, min(KNOWN_MOST, KNOWN_SCALARS // layout.size))

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
                product_D = self._operator.matvec(v_D)
                if len(self._known) < self._room:
                    self._known.append((v_D, product_D))
                return product_D
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._give_up(error, v_D)
        return self._operator.matvec(v_D)

    def known(self) -> Sequence[tuple[Tensor, Tensor]]:
        """The first products taken, by whoever took them; none once they are differences."""
        return self._known

    def release(self) -> None:
        """Free the graphs; the operator cannot be used afterwards."""
        self._operator.release()
        self._known = []
        self._pieces = []

    def _check(self) -> None:
        u_D, v_D = (random_unit(self, seed) for seed in (0, 1))
        left_D, right_D = self.matvec(u_D), self.matvec(v_D)
        if self.error is not None:
            return
        difference = (torch.dot(left_D, v_D) - torch.dot(right_D, u_D)).abs()
        if bool(difference > ASYMMETRY * (left_D.norm() + right_D.norm()) / self.size**0.5):
            self._give_up(RuntimeError("its products are not symmetric, a part has no second derivative"), u_D)
        elif isinstance(self._operator, HessianOperator) and self._operator.opaque:
            self._compare(u_D, left_D)

    def _compare(self, u_D: Tensor, product_D: Tensor) -> None:
        """With a custom autograd.Function: one that keeps its derivative as a constant leaves out a symmetric share."""
        differences = FiniteDifferenceOperator(self._pieces, self._layout, context=self._context)
        error, there_D = differences.error(u_D), differences.matvec(u_D)
        if bool((there_D - product_D).norm() > max(DIFFERENCE, 3 * error) * there_D.norm()):
            self._give_up(RuntimeError("its products differ from differences, a part has no second derivative"), u_D)

    def _give_up(self, error: Exception, v_D: Tensor) -> None:
        self._operator.release()
        self._use_differences(str(error).strip().splitlines()[0][:120], v_D)

    def _use_differences(self, reason: str, v_D: Tensor) -> None:
        differences = FiniteDifferenceOperator(self._pieces, self._layout, context=self._context)
        differences.route += f", since double backward failed: {reason}"
        self._known, self.reason = [], reason
        self._operator, self.error = differences, differences.error(v_D)
