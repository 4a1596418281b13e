"""Takeuchi's information criterion: gradient noise measured in units of curvature.

Shapes: N = examples of the step, D = trainable scalars, L = trained parameter tensors, or what stands for them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from instruments.curvature._diagonal import DiagonalEngine, check_engine, price_of_diagonal, read_diagonal
from instruments.curvature._matrix import Matrix
from instruments.curvature.trace import slices
from instruments.diagonals.draws import Draws
from instruments.instrument import Estimate, Gauge, Output, Values
from instruments.linalg.trace import Diagonal
from instruments.refusal import Refusal
from instruments.view import Need, View

FLOOR = 1e-3  # of the median of the positive entries
MOST_FLOORED = 0.1


@dataclass(frozen=True)
class Tic(Gauge):
    """tr(H^-1 C), which estimates N times the gap between training and test loss at a minimum, by three substitutes.

    C = mean g_i g_i' (uncentred) is that of the examples of the step, H and its diagonal h that of the held batches.
    For D parameters, d_l of them in tensor l:

        tic_trace = tr C / tr H,   tic_layers = sum_l d_l tr C_l / tr H_l,   tic_diagonal = sum_j C_jj / max(h_j, f),

    f = 0.001 of the median of the positive h_j. Where C and H are multiples of the identity the last two are right and
    the first is too small by the factor D. tic_layers takes curvature as even within a tensor, and a trace that is
    smaller than its standard error as that error. The theory is that of a minimum of a well specified model; during
    training read trends only.

    H is the Gauss-Newton matrix unless told otherwise: entries of the Hessian are negative at places, where the
    criterion means nothing. h is read by `engine`:

    - "drawn": mean square of the gradients of single held examples, for targets drawn from the model's own predictions
      `draws` times. Every entry averages over all held examples, so that models of any size are read. For CrossEntropy,
      BCEWithLogits and MSE losses.
    - "probes": `probes` products with random signs, for any loss and either matrix. The error of an entry is as large
      as the rest of its row: a few hundred parameters can be read so, hardly more.
    - "backpack", "backpack_mc": BackPACK's DiagGGNExact or DiagHessian, without an error, or its DiagGGNMC; for chains
      of layers that it knows.
    - "auto": drawn targets, and random signs where targets cannot be drawn. `diagonal` in the provenance says who
      computed what is read.

    1/h of a noisy h is too large; of drawn targets the bias is taken out by the jackknife. `floored` counts how often f
    took the place of an entry, and tic_diagonal is NaN where that is more than a tenth: then the other two are what can
    be known. Coordinates without any gradient add nothing.

    Standard errors: for tic_trace and tic_layers of C over examples and of h over draws or probes, to first order; for
    tic_diagonal of h alone, which is too little. NaN where a trace is zero, or negative by two standard errors.

    The original Cockpit divides by exact diagonal entries of the Hessian plus 1e-7, which may be negative or tiny, so
    that single coordinates decide the sum; and it takes both from the same mini-batch.
    """

    matrix: Matrix = "gauss_newton"
    probes: int = 16
    engine: DiagonalEngine | Literal["auto"] = "auto"
    draws: int = 8

    outputs: ClassVar[Mapping[str, Output]] = {
        "tic_trace": Output("1 / loss", "tr C / tr H: noise over curvature, both summed first"),
        "tic_layers": Output("1 / loss", "sum of C over mean H of each parameter tensor"),
        "tic_diagonal": Output("1 / loss", "sum of C_jj / H_jj; NaN where too many entries of H are not known"),
        "floored": Output("1", "share of the coordinates with a gradient whose entry of H was floored", edge=0.1),
        "trace_of_second_moment": Output("(loss / parameter)²", "tr C, mean squared norm of the gradients of examples"),
        "trace_of_curvature": Output("loss / parameter²", "tr H on the held batches"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"samples", "second_moment", "drawn_diagonal", "gauss_newton"})
    reference: ClassVar[str] = (
        "Thomas et al. 2020, On the interplay between noise and curvature and its effect on optimization and "
        "generalization, section 5; diagonal: Martens 2020, New insights and perspectives on the natural gradient "
        "method, section 9; Bekas, Kokiopoulou and Saad 2007, An estimator for the diagonal of a matrix"
    )

    def __post_init__(self) -> None:
        needs: frozenset[Need] = frozenset({"samples", "second_moment"})
        for engine in self._engines:
            needs |= check_engine(engine, self.matrix, self.probes, self.draws)
        object.__setattr__(self, "needs", needs)

    @property
    def _engines(self) -> Sequence[DiagonalEngine]:
        """In the order in which they are tried."""
        if self.engine != "auto":
            return (self.engine,)
        return ("probes",) if self.matrix == "hessian" else ("drawn", "probes")

    def price(self, view: View) -> float:
        engines = self._engines
        engine = engines[0] if len(engines) == 1 or view.diagonals.drawable() else engines[1]
        return (
            view.sample_pass
            + 2 / 3
            + price_of_diagonal(view, engine, self.matrix, products=self.probes, draws=self.draws)
        )

    def read(self, view: View) -> Values:
        moments = view.moments
        assert moments.second_D is not None
        examples = view.meter.provenance["examples"]
        found = self._diagonal(view)
        view.meter.provenance.update(batch="step and held", examples=examples)
        norms_sq_NL = moments.norms_sq_NL.to(found.values_D.device).double()
        size = len(found.values_D)
        (trace,), (trace_error,) = found.sums([[slice(0, size)]])
        noise, noise_error = _mean(norms_sq_NL.sum(1))
        diagonal_form, floored = by_coordinate(moments.second_D, found)
        return {
            "tic_trace": by_tensor(norms_sq_NL.sum(1, keepdim=True), found, [slice(0, size)], [1]),
            "tic_layers": by_tensor(norms_sq_NL, found, slices(view.layout), [p.numel() for p in view.layout.params]),
            "tic_diagonal": diagonal_form,
            "floored": floored,
            "trace_of_second_moment": Estimate(noise, noise_error),
            "trace_of_curvature": Estimate(trace, trace_error),
        }

    def _diagonal(self, view: View) -> Diagonal | Draws:
        reasons = []
        for engine in self._engines:
            try:
                return read_diagonal(view, engine, self.matrix, probes=self.probes, draws=self.draws)
            except Refusal as refusal:
                reasons.append(str(refusal))
        raise Refusal(" | ".join(reasons))


def by_tensor(norms_sq_NL: Tensor, found: Diagonal | Draws, pieces: Sequence[slice], counts: Sequence[int]) -> Estimate:
    """sum_l counts_l tr C_l / tr H_l, traces no smaller than their errors. Pieces without gradient add nothing; with a
    gradient and no curvature, or a negative one, they make it NaN."""
    heard_L = norms_sq_NL.sum(0) != 0
    trace_L, error_L = found.sums([[piece] for piece in pieces])
    trace_L = torch.where(trace_L > -2 * error_L, torch.maximum(trace_L, error_L), torch.nan)
    count_L = torch.tensor(counts, dtype=trace_L.dtype, device=trace_L.device)
    weight_L = torch.where(heard_L, count_L / torch.where(trace_L > 0, trace_L, torch.nan), 0.0)
    value, over_examples = _mean(norms_sq_NL @ weight_L)
    slope_L = torch.where(heard_L, norms_sq_NL.mean(0) * weight_L / trace_L, 0.0)
    return Estimate(value, torch.hypot(over_examples, (slope_L * error_L).norm()))


def by_coordinate(second_D: Tensor, found: Diagonal | Draws) -> tuple[Estimate, Tensor]:
    """sum C_jj / max(h_j, f) with the error of h, and the share of entries floored among those with a gradient."""
    h_D, second_D = found.values_D.double(), second_D.to(found.values_D.device).double()
    moved_D = second_D > 0
    floor = FLOOR * h_D[moved_D & (h_D > 0)].nanmedian()  # NaN where there is none
    floored = (~(h_D >= floor) & moved_D).sum() / moved_D.sum()
    if isinstance(found, Draws):
        value, error = found.jackknife(lambda h_D: (second_D / torch.where(h_D >= floor, h_D.double(), floor)).sum())
    else:
        low_D = ~(h_D >= floor)
        terms_D = second_D / torch.where(low_D, floor, h_D)
        slopes_D = torch.where(low_D, 0.0, terms_D / h_D)
        value, error = terms_D.sum(), torch.sqrt(2 * (slopes_D.square() * found.variances_D.double()).sum())
    value, error = torch.where(floored <= MOST_FLOORED, torch.stack([value, error]), torch.nan)
    return Estimate(value, error), floored


def _mean(values_N: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the examples and its standard error."""
    return values_N.mean(), values_N.std() / len(values_N) ** 0.5
