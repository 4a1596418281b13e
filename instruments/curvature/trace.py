"""The trace of the curvature, whole and by parameter tensor.

Shapes: D = trainable scalars, L = trained parameter tensors, K = vectors kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from instruments.curvature._diagonal import DiagonalEngine, check_engine, price_of_diagonal, read_diagonal
from instruments.curvature._matrix import Matrix, at_least, operator_of
from instruments.diagonals.draws import Draws
from instruments.instrument import Estimate, Instrument, Output, State, Values
from instruments.layout import Layout
from instruments.linalg.trace import Diagonal, diagonal
from instruments.operators.operator import Operator
from instruments.view import Need, View


@dataclass(frozen=True)
class CurvatureTrace(Instrument):
    """tr A, A the Gauss-Newton matrix or the Hessian on the held batches: the sum of its eigenvalues.

    For random signs x the expectation of x'Ax is the trace, and that of x_l'(Ax)_l the trace of the diagonal block of
    tensor l: all layers come from the same products. `deflate` vectors are kept from reading to reading, one step of
    subspace iteration at each; within their span the trace is exact, outside it is estimated (Hutchinson with
    deflation), so that a few outlying eigenvalues do not make all of the noise: 3.7 % instead of 10 % for the same 16
    products, along the training of a small classifier. At the first reading there are none, and their products go to
    probes. Where the matrix is nearly diagonal signs alone see it best: then `deflate=0`. Cost: `probes + deflate`
    products. Memory: `deflate` vectors of length D.

    The standard error comes from the scatter of x * Ax coordinate by coordinate (`instruments.linalg.trace`); that of
    a layer leaves out that its own noise is partly shared, and is too wide by at most sqrt(2). With fewer than 16
    probes and one dominant eigenvalue, before the vectors have found it, it is somewhat too narrow.

    `engine` names others than random signs ("probes"), which do without products. "drawn": the mean square of the
    gradients of single examples for targets drawn from the model's own predictions, `draws` times, whose expectation is
    the Gauss-Newton diagonal; for the losses that such targets are known of, and any model whose examples have
    gradients of their own. "backpack": BackPACK's exact diagonal of either matrix (DiagGGNExact, DiagHessian), without
    an error, for chains of layers that it knows; its price grows with the number of outputs, and for the Hessian with
    the features behind curved activations. "backpack_mc": its DiagGGNMC. What an engine cannot read it refuses with the
    reason; the standard errors of drawn targets are those over the draws. For MLPs on digits they were 0.1 % of the
    trace before training, 4 % at a loss of 0.05 and 18 % at 0.009, when targets other than the predicted ones are
    hardly ever drawn; those of 16 random signs were 8, 12 and 13 % (`tests/benchmarks/diagonal_engines.py`).

    The trace of the Hessian may be negative; the Gauss-Newton matrix leaves out the curvature of the model, is
    positive, and its trace is the smoother curve. The trace of a mean loss hardly depends on the number of examples, as
    the sharpness does. Original Cockpit sums an exact diagonal, for a list of layers it knows; random signs do it for
    any model. A model whose parameters are not finite reads NaN.
    """

    matrix: Matrix = "gauss_newton"
    probes: int = 12
    deflate: int = 4
    engine: DiagonalEngine = "probes"
    draws: int = 8

    outputs: ClassVar[Mapping[str, Output]] = {
        "trace": Output("loss / parameter²", "sum of all eigenvalues of the curvature on the held batches", edge=0.0),
        "mean": Output("loss / parameter²", "the trace by parameter: the mean eigenvalue"),
        "per_layer": Output("loss / parameter²", "trace of the diagonal block of each parameter tensor", "per-layer"),
        "per_layer_stderr": Output(
            "loss / parameter²", "standard error of per_layer, or up to 1.41 times it", "per-layer"
        ),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"gauss_newton"})
    reference: ClassVar[str] = (
        "Hutchinson 1990, A stochastic estimator of the trace of the influence matrix; deflation: Gambhir, "
        "Stathopoulos and Orginos 2017, Deflation as a method of variance reduction for estimating the trace of a "
        "matrix inverse"
    )

    def __post_init__(self) -> None:
        needs = check_engine(self.engine, self.matrix, self.probes, self.draws)
        object.__setattr__(self, "needs", needs)
        at_least("deflate", self.deflate, 0)

    def price(self, view: View) -> float:
        products = self.probes + self.deflate
        return price_of_diagonal(view, self.engine, self.matrix, products=products, draws=self.draws)

    def init(self) -> State:
        return {"basis_KD": None}

    def advance(self, view: View, state: State) -> tuple[Values, State]:
        if self.engine != "probes":
            found = read_diagonal(view, self.engine, self.matrix, probes=0, draws=self.draws)
            return _traces(found, view.layout), state
        operator = operator_of(view, self.matrix)
        basis_KD = fitting(state["basis_KD"], operator)
        probes = self.probes if basis_KD is not None else self.probes + self.deflate
        scattered = diagonal(operator, probes=probes, seed=view.step, basis_KD=basis_KD)
        kept = "" if basis_KD is None else f" outside of {len(basis_KD)} vectors"
        view.meter.provenance["diagonal"] = f"{probes} random signs{kept}"
        return _traces(scattered, view.layout), {"basis_KD": self._next(operator, scattered.images_KD, view.step)}

    def _next(self, operator: Operator, images_KD: Tensor, seed: int) -> Tensor | None:
        """Orthonormal rows that span the images of the last ones; random ones to begin with, and after what is NaN."""
        count = min(self.deflate, operator.size - 1)
        if count < 1:
            return None
        if len(images_KD) != count or not bool(images_KD.isfinite().all()):
            generator = torch.Generator().manual_seed(seed)
            images_KD = torch.randn(count, operator.size, generator=generator, dtype=operator.dtype)
        basis_KD: Tensor = torch.linalg.qr(images_KD.T).Q.T.contiguous()
        return basis_KD


def _traces(found: Diagonal | Draws, layout: Layout) -> Values:
    sums_L, errors_L = found.sums([[piece] for piece in slices(layout)])
    (total,), (error,) = found.sums([[slice(0, layout.size)]])
    return {
        "trace": Estimate(total, error),
        "mean": Estimate(total / layout.size, error / layout.size),
        "per_layer": sums_L,
        "per_layer_stderr": errors_L,
    }


def fitting(basis_KD: Tensor | None, operator: Operator) -> Tensor | None:
    """The vectors kept, unless the model has another size by now."""
    fits = basis_KD is not None and basis_KD.shape[1] == operator.size
    return basis_KD.to(operator.device, operator.dtype) if basis_KD is not None and fits else None


def slices(layout: Layout) -> list[slice]:
    """Where each parameter tensor stands in the flat vector."""
    ends = torch.tensor([0, *(p.numel() for p in layout.params)]).cumsum(0).tolist()
    return [slice(a, b) for a, b in pairwise(ends)]
