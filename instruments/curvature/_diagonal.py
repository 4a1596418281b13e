"""Who computes the diagonal of the curvature, where that is a setting."""

from typing import Literal, get_args

from instruments.curvature._matrix import Matrix, at_least, operator_of, price_of
from instruments.diagonals.backpack import Extension
from instruments.diagonals.draws import Draws
from instruments.linalg.trace import Diagonal, diagonal
from instruments.view import Need, View

DiagonalEngine = Literal["probes", "drawn", "backpack", "backpack_mc"]
"""Random signs; drawn targets; DiagGGNExact or DiagHessian; DiagGGNMC."""


def check_engine(engine: DiagonalEngine, matrix: Matrix, probes: int, draws: int) -> frozenset[Need]:
    """For `__post_init__`: what this engine needs of a step. ValueError for settings that mean nothing."""
    if engine not in get_args(DiagonalEngine):
        raise ValueError(f"expected engine to be one of {', '.join(get_args(DiagonalEngine))}, got {engine!r}.")
    if matrix not in get_args(Matrix):
        raise ValueError(f"expected matrix to be one of {', '.join(get_args(Matrix))}, got {matrix!r}.")
    if matrix == "hessian" and engine in ("drawn", "backpack_mc"):
        raise ValueError(
            f"expected matrix='gauss_newton' for engine={engine!r}, got 'hessian': gradients for drawn targets have "
            "the Gauss-Newton matrix as their second moment; take engine='probes' or 'backpack' for the Hessian."
        )
    at_least("probes", probes, 2)
    at_least("draws", draws, 2)
    if engine == "probes":
        return frozenset({matrix})
    return frozenset({"drawn_diagonal" if engine == "drawn" else "backpack_diagonal"})


def read_diagonal(view: View, engine: DiagonalEngine, matrix: Matrix, *, probes: int, draws: int) -> Diagonal | Draws:
    """The diagonal on the held batches; `diagonal` in the provenance says who computed it."""
    if engine == "drawn":
        return view.drawn_diagonal(draws)
    if engine != "probes":
        return view.backpack_diagonal(_extension(engine, matrix), draws)
    found = diagonal(operator_of(view, matrix), probes=probes, seed=view.step)
    view.meter.provenance["diagonal"] = f"{probes} random signs"
    return found


def price_of_diagonal(view: View, engine: DiagonalEngine, matrix: Matrix, *, products: int, draws: int) -> float:
    """In g; `products` is for random signs."""
    if engine == "probes":
        return price_of(matrix, products)
    if engine == "drawn":
        return view.diagonals.drawn_price(draws)
    return view.diagonals.backpack_price(_extension(engine, matrix), draws)


def _extension(engine: DiagonalEngine, matrix: Matrix) -> Extension:
    if matrix == "hessian":
        return "DiagHessian"
    return "DiagGGNMC" if engine == "backpack_mc" else "DiagGGNExact"
