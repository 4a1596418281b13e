"""Which matrix of curvature an instrument reads, where that is a setting."""

from typing import Literal, get_args

from instruments.instrument import Instrument
from instruments.operators.gauss_newton import PRICES
from instruments.operators.hessian import KEPT_PRODUCT
from instruments.operators.operator import Operator
from instruments.view import View

Matrix = Literal["gauss_newton", "hessian"]
PRODUCT: dict[Matrix, float] = {"gauss_newton": PRICES["kept"], "hessian": KEPT_PRODUCT}
"""In g."""


def need_only(instrument: Instrument, matrix: Matrix) -> None:
    """For `__post_init__`: the instrument needs the matrix of its setting and, of the two, no other."""
    if matrix not in get_args(Matrix):
        raise ValueError(f"expected matrix to be one of {', '.join(get_args(Matrix))}, got {matrix!r}.")
    others = instrument.needs - frozenset(get_args(Matrix))
    object.__setattr__(instrument, "needs", others | {matrix})


def at_least(name: str, value: int, least: int) -> None:
    """For `__post_init__`: ValueError where a setting is too small."""
    if value < least:
        raise ValueError(f"expected {name} of at least {least}, got {value}.")


def operator_of(view: View, matrix: Matrix) -> Operator:
    """The matrix of the loss on the held batches."""
    return view.hessian if matrix == "hessian" else view.gauss_newton


def price_of(matrix: Matrix, products: float) -> float:
    """In g: the graph and so many products."""
    return 1.0 + products * PRODUCT[matrix]
