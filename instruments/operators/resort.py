"""The Hessian by double backward, and by differences of the gradient where that turns out to be impossible."""

from collections.abc import Sequence

import torch
from torch import Tensor

from instruments.layout import Layout
from instruments.operators.finite_difference import FiniteDifferenceOperator
from instruments.operators.hessian import Context, HessianOperator, Piece
from instruments.operators.operator import Operator, random_unit
from instruments.operators.suspects import hooked_beyond_masks
from instruments.refusal import Refusal

KNOWN_LEAST, KNOWN_MOST, KNOWN_SCALARS = 4, 16, 2**27
"""Products that are remembered for whoever reads the same matrix at this step: how many, and how much memory."""
ASYMMETRY = 0.05
"""Of |u'Hv - v'Hu| against what |u'Hv| is for random unit vectors, |Hv| / sqrt(D); rounding leaves 1e-4 of it."""
ROUNDING = 16.0
"""Units in the last place that a product in half precision is off."""
DIFFERENCE = 0.02
"""Of a product by double backward against differences, relative to its size."""


class LastResortHessian(Operator):
    """Products by `HessianOperator` until PyTorch says that something has no second derivative.

    From then on all of them are central differences; `route` says so, with the reason. `error` is the estimated
    relative error of a product: None while double backward works in single precision or better.

    A part that cannot be differentiated twice does not always raise: an operation whose backward is opaque leaves its
    share of the product out. That is looked for once, by the symmetry of two products, and with an autograd.Function
    in the graph by differences too, unless `reason` says what was found before: "" for nothing, else why
    products are differences from the start. Afterwards the attribute `reason` says the same of this operator, and
    `looked` what looking has cost in g. Raises Refusal where the differences are not symmetric either: then the
    gradient is that of no loss.
    """

    def __init__(
        self, pieces: Sequence[Piece], layout: Layout, *, keep_graphs: bool, context: Context, reason: str | None = None
    ) -> None:
        self._pieces, self._layout, self._context = pieces, layout, context
        self._operator: HessianOperator | FiniteDifferenceOperator
        self.size, self.dtype, self.device = layout.size, layout.dtype, layout.device
        self.error: float | None = None
        self.reason, self.looked = reason or "", 0.0
        self._known: list[tuple[Tensor, Tensor]] = []
        self._room = 0
        if reason:
            self._use_differences(reason, random_unit(self, 0))
            return
        self._operator = HessianOperator(pieces, layout, keep_graphs=keep_graphs, context=context)
        self._versions = [p._version for p in layout.params]
        suspects = self._operator.suspects
        if suspects.half:
            self.error = ROUNDING * torch.finfo(suspects.precision).eps
            name = str(suspects.precision).removeprefix("torch.")
            self._operator.route += f", wholly or in part in {name}"
        if reason is None:
            self._check(opaque=suspects.opaque)
        self._room = max(KNOWN_LEAST, min(KNOWN_MOST, KNOWN_SCALARS // layout.size))

    @property
    def price(self) -> float:  # type: ignore[override]
        return self._operator.price

    @property
    def route(self) -> str:  # type: ignore[override]
        return self._operator.route

    @property
    def weight(self) -> Tensor | float:
        """What the loss of all batches weighs, once a product was taken."""
        return self._operator.weight

    @property
    def gradient_D(self) -> Tensor:
        """Gradient of the same loss, shape (D,)."""
        return self._operator.gradient_D

    def matvec(self, v_D: Tensor) -> Tensor:
        if isinstance(self._operator, HessianOperator):
            try:
                product_D = self._operator.matvec(v_D)
                if len(self._known) < self._room:
                    self._known.append((v_D, product_D))
                return product_D
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._refuse_moved(error)
                self._give_up(str(error), v_D)
        return self._operator.matvec(v_D)

    def known(self) -> Sequence[tuple[Tensor, Tensor]]:
        """The first products taken, by whoever took them; none once they are differences."""
        return self._known

    def release(self) -> None:
        """Free the graphs; the operator cannot be used afterwards."""
        self._operator.release()
        self._known = []
        self._pieces = []

    def _check(self, *, opaque: bool) -> None:
        v_KD = torch.stack([random_unit(self, seed) for seed in range(2)])
        products_KD = torch.stack([self.matvec(v_D) for v_D in v_KD])
        if not isinstance(self._operator, HessianOperator):
            return
        self.looked += 2 * self._operator.price
        if hooked_beyond_masks(self._layout.params):
            self._give_up("a hook scales or limits the gradient of a parameter, and is met twice", v_KD[0])
        elif _asymmetric(v_KD, products_KD, ASYMMETRY):
            self._give_up("its products are not symmetric, a part has no second derivative", v_KD[0])
        elif opaque:
            self._compare(products_KD[0])

    def _compare(self, v_D: Tensor) -> None:
        """With a custom autograd.Function: one that keeps its derivative as a constant leaves out a symmetric share.
        Along a product, which a hook that masks leaves as it is."""
        v_D = v_D / v_D.norm().clamp_min(torch.finfo(self.dtype).tiny)
        product_D = self._operator.matvec(v_D)
        differences = FiniteDifferenceOperator(self._pieces, self._layout, context=self._context)
        error, there_D = differences.error(v_D), differences.matvec(v_D)
        self.looked += self._operator.price + 3 * differences.price
        if bool((there_D - product_D).norm() > max(DIFFERENCE, 3 * error, self.error or 0.0) * there_D.norm()):
            self._give_up("its products differ from differences, a part has no second derivative", v_D)

    def _give_up(self, reason: str, v_D: Tensor) -> None:
        self._operator.release()
        self._use_differences(reason.strip().splitlines()[0][:120], v_D)
        assert self.error is not None
        v_KD = torch.stack([random_unit(self, seed) for seed in range(3)])
        products_KD = torch.stack([self._operator.matvec(v_D) for v_D in v_KD])
        self.looked += 3 * self._operator.price
        if _asymmetric(v_KD, products_KD, max(ASYMMETRY, 3 * self.error)):
            raise Refusal(
                "expected the gradient of a loss, got one that is the gradient of none: neither double backward "
                "nor its differences are symmetric (a gradient reversal, a hook that scales the gradient of some "
                "parameters, a backward written by hand that is another function's), so there is no Hessian to read."
            )

    def _use_differences(self, reason: str, v_D: Tensor) -> None:
        differences = FiniteDifferenceOperator(self._pieces, self._layout, context=self._context)
        differences.route += f", since double backward failed: {reason}"
        self._known, self.reason = [], reason
        self._operator, self.error = differences, differences.error(v_D)
        self.looked += 2 * differences.price

    def _refuse_moved(self, error: Exception) -> None:
        """A graph that is older than the parameters: the differences would be those of another point."""
        if [p._version for p in self._layout.params] != self._versions:
            raise Refusal(
                "expected parameters that stand still during a reading, got some that were written to since the graph "
                "was built; read before the optimizer's step, or after it from the beginning."
            ) from error


def _asymmetric(v_KD: Tensor, products_KD: Tensor, allowed: float) -> bool:
    """Whether (Au)'v and (Av)'u of some pair differ by more than that share of what they are for random vectors."""
    forms_KK, norms_K = products_KD @ v_KD.T, products_KD.norm(dim=1)
    usual_KK = (norms_K[:, None] + norms_K) / v_KD.shape[1] ** 0.5
    return bool(((forms_KK - forms_KK.T).abs() > allowed * usual_KK).any())
