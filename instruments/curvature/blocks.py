"""Which layer is sharp: top eigenvalue and trace of the diagonal blocks of the Hessian.

Shapes: D = trainable scalars, M = blocks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from instruments.curvature._matrix import at_least, price_of
from instruments.curvature._top import Top, start_from, top_eigenpairs
from instruments.instrument import Instrument, Output, State, Values
from instruments.layout import Layout
from instruments.linalg.trace import diagonal
from instruments.operators.block import BlockOperator
from instruments.operators.blocks import Block, by_layer, by_pattern
from instruments.operators.operator import Operator
from instruments.view import Need, View

USUAL = 3.5
"""Products of one warm eigenvalue at the default tolerance."""


@dataclass(frozen=True)
class Blocks(Instrument):
    """lambda_max and trace of the diagonal block of the Hessian of each layer, on the held batches.

    A layer is a module that holds parameters itself, weight and bias together; of more than `most` layers the ones with
    the most parameters are read, in the order of the model. `patterns` of parameter names ("encoder.*") name other
    blocks instead, which may overlap. The names of the blocks are in the provenance.

    Eigenvalues by Lanczos from the last eigenvector of each block, stopped when the residual is at most `tol` times the
    value: never above the true one, and some eigenvalue of the block lies within `residual`. A product with a block
    costs as much as one with the whole, so the price grows with the number of blocks. The traces come from `probes`
    random signs for all blocks together, their standard errors at most sqrt(2) too wide.

    `share` is the largest block's eigenvalue over that of the whole Hessian. It is never above 1 but for the error of
    the latter: eigenvalues of a block interlace with those of the whole. Near 1 that layer alone limits the learning
    rate; far below, sharpness comes from layers acting together, which no block shows. NaN where the sharpness is not
    positive or a model is not finite. `largest` is the place of that block. Memory: one vector of length D and one for
    each block.
    """

    tol: float = 0.05
    most: int = 8
    probes: int = 8
    max_products: int = 12
    patterns: tuple[str, ...] = ()

    outputs: ClassVar[Mapping[str, Output]] = {
        "eigenvalue": Output("loss / parameter²", "largest eigenvalue of each block; may be NaN", "per-module"),
        "residual": Output("loss / parameter²", "residual of each eigenvector; may be NaN", "per-module"),
        "trace": Output("loss / parameter²", "sum of the eigenvalues of each block", "per-module"),
        "trace_stderr": Output("loss / parameter²", "standard error of trace, at most 1.41 too wide", "per-module"),
        "sharpness": Output("loss / parameter²", "largest eigenvalue of the whole Hessian"),
        "share": Output("1", "the largest block's eigenvalue over the sharpness"),
        "largest": Output("block", "which block that is, in the order of the names, from 0"),
        "converged": Output("1", "1 when all residuals met the tolerance, 0 when products ran out"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"hessian"})
    reference: ClassVar[str] = (
        "Zhang et al. 2024, Why transformers need Adam: a Hessian perspective; interlacing: Horn and Johnson 2013, "
        "Matrix analysis, theorem 4.3.28"
    )

    def __post_init__(self) -> None:
        at_least("most", self.most, 1)
        at_least("probes", self.probes, 2)
        at_least("max_products", self.max_products, 1)

    def price(self, view: View) -> float:
        found = [*(block.size for block in self._blocks(view.layout)), view.layout.size]
        return price_of("hessian", self.probes + sum(min(USUAL, size) for size in found))

    def init(self) -> State:
        return {"names": [], "vectors": []}

    def advance(self, view: View, state: State) -> tuple[Values, State]:
        operator, gradient_D = view.hessian, view.gradient_D
        blocks = self._blocks(view.layout)
        names = [block.name for block in blocks]
        view.meter.provenance["modules"] = names
        known = state["vectors"] if state["names"] == names else [None] * (len(blocks) + 1)
        pairs: list[tuple[Operator, Tensor]] = [(operator, gradient_D)]
        pairs += [(BlockOperator(operator, block), block.cut(gradient_D)) for block in blocks]
        tops = [self._top(a, v_D, hint_D, view.step) for (a, hint_D), v_D in zip(pairs, known, strict=True)]
        found = diagonal(operator, probes=self.probes, seed=view.step)
        traces_M, errors_M = found.sums([block.slices for block in blocks])
        whole, parts = tops[0], tops[1:]
        values: Values = {
            "eigenvalue": np.array([top.values[0] for top in parts]),
            "residual": np.array([top.residuals[0] for top in parts]),
            "trace": traces_M,
            "trace_stderr": errors_M,
            **_shares(whole, parts),
            "converged": float(all(top.converged for top in tops)),
        }
        return values, {"names": names, "vectors": [top.kept() for top in tops]}

    def _blocks(self, layout: Layout) -> list[Block]:
        if self.patterns:
            return by_pattern(layout, self.patterns)
        blocks = by_layer(layout)
        largest = sorted(range(len(blocks)), key=lambda i: -blocks[i].size)[: self.most]
        return [blocks[i] for i in sorted(largest)]

    def _top(self, operator: Operator, kept_D: Tensor | None, hint_D: Tensor, seed: int) -> Top:
        start_D = start_from(operator, kept_D, hint_D, seed)
        return top_eigenpairs(operator, start_D, k=1, tol=self.tol, max_products=self.max_products)


def _shares(whole: Top, parts: Sequence[Top]) -> dict[str, float]:
    """Sharpness, and the largest block against it."""
    sharpness, each_M = float(whole.values[0]), np.array([top.values[0] for top in parts])
    known = bool(np.isfinite(each_M).all())
    largest = int(each_M.argmax()) if known else -1
    return {
        "sharpness": sharpness,
        "share": float(each_M[largest]) / sharpness if known and sharpness > 0 else float("nan"),
        "largest": float(largest) if known else float("nan"),
    }
