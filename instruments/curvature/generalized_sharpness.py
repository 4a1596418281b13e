"""Experimental: sharpness in the norm of the step, for optimizers by signs (Lion) or orthogonal matrices (Muon).

Shapes: D = trainable scalars.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch

from instruments.curvature._matrix import at_least, price_of
from instruments.curvature._unit_ball import Norm, UnitBall, sharpest_corner
from instruments.instrument import Instrument, Output, State, Values
from instruments.operators.operator import random_unit
from instruments.view import Need, View


@dataclass(frozen=True)
class GeneralizedSharpness(Instrument):
    """S = max d'Hd over the unit ball of a norm; experimental. A lower bound, on the held batches.

    Steepest descent in a norm |.| goes along -d, d the corner of the ball that the gradient points to: its sign for the
    largest entry (`norm="max"`: signSGD, Lion), the polar factor U V' of each matrix for the largest singular value
    (`norm="spectral"`: Muon; vectors by their largest entry). Scaled by the dual norm, theta+ = theta - eta |g|_* d, it
    lowers a quadratic with positive curvature while eta < 2/S, and training was seen to hover there. Lion and Muon take
    the step eta d without that scale: along it curvature takes back r = 1/2 u'Hu / (-g'u) <= eta S / (2 |g|_*) of the
    gain, so below `critical_learning_rate` = 2 |g|_* / S no such step raises the quadratic. It is no edge: training
    goes on above it. Momentum is left out, and so are factors by the shape of a matrix. What the step taken does is in
    `step/step_ratio`; for optimizers with a D read `curvature/preconditioned_sharpness`.

    Finding the maximum is NP-hard for signs. The search goes from corner to corner, uphill, `starts` times: from where
    the last reading ended (at first from the gradient's own corner), and from random corners. The value is the best
    corner met, never above S (0 where all found are negative, since d = 0 is in the ball); where `lowest` is far below
    it, the ends disagree and S may be above: along the training of a small classifier four starts came to between 93
    and 100 % of the best of thirty (`tests/benchmarks/sharpest_corner.py`), on random matrices without outliers they
    do worse. Restrict it to the matrices that Muon holds by `parameters=`; an SVD of each is taken for every product.
    """

    norm: Norm = "max"
    starts: int = 4
    tol: float = 1e-3
    max_products: int = 12

    outputs: ClassVar[Mapping[str, Output]] = {
        "sharpness": Output("loss", "largest d'Hd found over steps d of norm 1, in units of the step"),
        "lowest": Output("loss", "the lowest d'Hd that one of the starts ended at: the doubt of the search"),
        "converged": Output("1", "1 when no corner was better to first order, 0 when products ran out"),
        "dual_norm": Output("loss", "|g|_*: sum of |entries|, or of singular values, of the gradient"),
        "critical_learning_rate": Output(
            "as the learning rate", "2 |g|_* / S, below which no step of the norm raises the quadratic"
        ),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"hessian"})
    reference: ClassVar[str] = (
        "Islamov, Crawshaw, Cohen and Gower 2026, Non-Euclidean gradient descent operates at the edge of stability"
    )

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise ValueError(f"expected norm to be one of {', '.join(get_args(Norm))}, got {self.norm!r}.")
        at_least("starts", self.starts, 1)
        at_least("max_products", self.max_products, 2)

    def price(self, view: View) -> float:
        return price_of("hessian", 7.5 * self.starts)

    def init(self) -> State:
        return {"corner_D": None}

    def advance(self, view: View, state: State) -> tuple[Values, State]:
        operator, g_D, ball = view.hessian, view.gradient_D, UnitBall(self.norm, view.layout)
        own_D, kept_D = ball.corner(g_D), state["corner_D"]
        fits = kept_D is not None and len(kept_D) == operator.size
        starts = [kept_D.to(own_D) if fits else own_D]
        for k in range(1, self.starts):
            starts.append(ball.corner(random_unit(operator, view.step * self.starts + k)))
        best, lowest = sharpest_corner(operator, ball, starts, tol=self.tol, max_products=self.max_products)
        dual = float(torch.dot(g_D, own_D))
        sharpness = max(best.value, 0.0) if not math.isnan(best.value) else math.nan
        values: Values = {
            "sharpness": sharpness,
            "lowest": lowest,
            "converged": float(best.converged),
            "dual_norm": dual,
            "critical_learning_rate": 2 * dual / sharpness
            if sharpness > 0
            else math.inf
            if sharpness == 0
            else math.nan,
        }
        return values, {"corner_D": best.corner_D if math.isfinite(best.value) else None}
