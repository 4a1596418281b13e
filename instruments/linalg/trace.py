"""The trace of a symmetric operator from products with random vectors, each estimate with its standard error.

Hutchinson's estimate of tr B is the mean of x'Bx over random x with E xx' = I. Here x has random signs (Rademacher):
its variance 2 sum_{i != j} B_ij^2 is never above the 2 |B|_F^2 of Gaussian x, and is zero for a diagonal matrix.

Standard error. The sample variance of x'Bx is a poor guide with few probes: one dominant eigenvalue makes the values
as skew as chi-square with one degree of freedom, and an estimate that is low then also believes itself precise. With
d = x * Bx (coordinate by coordinate; its sum is x'Bx, its mean the diagonal), random signs give

    Var(x'Bx) = 2 sum_i Var(d_i)        because both sides are 2 sum_{i != j} B_ij^2,

and the right side adds up sample variances of all coordinates. Three of these standard errors cover the trace in at
least 99 % of the draws from `MIN_PROBES` = 16 probes on, whatever the spectrum. Only where one eigenvalue dominates are
so many needed (there 8 probes give 98 %, 4 give 97 %); for spread spectra 4 are enough.

Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix"; Meyer, Musco, Musco and Woodruff 2021,
"Hutch++: optimal stochastic trace estimation"; Bekas, Kokiopoulou and Saad 2007, "An estimator for the diagonal of a
matrix"; Epperly, Tropp and Webber 2024, "XTrace: making the most of every sample
in stochastic trace estimation".

Shapes: D = size of the operator, K = vectors of a basis, M = test vectors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from instruments.operators.operator import Operator

MIN_PROBES = 16
MIN_XTRACE = 32
ORTHONORMAL = 1e-3  # most that |Q'Q - I| may be


@dataclass(frozen=True)
class Trace:
    """`value` and its standard error `stderr`, in the unit of the operator; `products` with the operator in all."""

    value: float
    stderr: float
    products: int


@dataclass(frozen=True)
class Diagonal:
    """`values_D` estimates the diagonal, `variances_D` is the variance of each of its entries.

    The errors of two entries i and j are correlated, with covariance B_ij^2 over the number of probes; hence the
    variance of a sum of w_i values_i is at most 2 sum w_i^2 variances_i, and is that for equal w over all coordinates.
    `images_KD` are the products with the rows of the basis.
    """

    values_D: Tensor
    variances_D: Tensor
    images_KD: Tensor

    def sums(self, pieces: Sequence[Sequence[slice]]) -> tuple[Tensor, Tensor]:
        """Sum of the diagonal over each list of slices, and its standard error, too wide by at most sqrt(2)."""
        values = torch.stack([_total(self.values_D, slices) for slices in pieces])
        variances = torch.stack([_total(self.variances_D, slices) for slices in pieces])
        return values, torch.sqrt(2 * variances)


def _total(v_D: Tensor, slices: Sequence[slice]) -> Tensor:
    return torch.stack([v_D[s].sum(dtype=torch.float64) for s in slices]).sum()


def diagonal(operator: Operator, *, probes: int, seed: int, basis_KD: Tensor | None = None) -> Diagonal:
    """The diagonal of A: mean of x * Ax over `probes` vectors x of random signs (Bekas, Kokiopoulou and Saad 2007).

    With orthonormal rows Q of a basis (a product each) it is that of QQ'A + AQQ' - QQ'AQQ' exactly, and of PAP with
    P = I - Q'Q by probes: as for `deflated`, any basis that does not depend on `seed` will do. Where the diagonal is
    small against the rest of its row, the error of an entry is larger than the entry.
    """
    if basis_KD is None:
        values_D, variances_D = _scatter(operator.matvec, operator, probes, _generator(seed))
        return Diagonal(values_D, variances_D, values_D.new_empty(0, operator.size))
    basis_KD = basis_KD.to(operator.device, operator.dtype)
    _check_orthonormal(basis_KD)
    images_KD = torch.stack([operator.matvec(q_D) for q_D in basis_KD])
    inner_KK = basis_KD @ images_KD.T
    inside_D = (basis_KD * (2 * images_KD - inner_KK @ basis_KD)).sum(0)
    values_D, variances_D = _scatter(_outside(operator, basis_KD), operator, probes, _generator(seed))
    return Diagonal(inside_D + values_D, variances_D, images_KD)


def hutchinson(operator: Operator, *, probes: int, seed: int) -> Trace:
    """Mean of x'Ax over `probes` vectors of random signs. The error falls as 1/sqrt(probes)."""
    mean, stderr = _mean_form(operator.matvec, operator, probes, _generator(seed))
    return _result(torch.stack([mean, stderr]), probes)


def deflated(
    operator: Operator, basis_KD: Tensor, *, probes: int, seed: int, quotients: Sequence[float] | None = None
) -> Trace:
    """tr(QAQ') + tr(PAP) with P = I - Q'Q: the first exactly, the second by Hutchinson.

    `basis_KD` are orthonormal rows, for example Ritz vectors of tracked outliers. They need not be eigenvectors: the
    estimate is unbiased for any basis, and the better the more of |A|_F^2 lies in it. `quotients` are q'Aq of the rows
    where they are known (the Ritz values); otherwise they cost a product each. The basis must not depend on `seed`.
    """
    basis_KD = basis_KD.to(operator.device, operator.dtype)
    _check_orthonormal(basis_KD)
    if quotients is None:
        inside = _inside(operator, basis_KD)
    else:
        inside = torch.as_tensor(sum(quotients), dtype=operator.dtype, device=operator.device)
    mean, stderr = _mean_form(_outside(operator, basis_KD), operator, probes, _generator(seed))
    paid = 0 if quotients is not None else len(basis_KD)
    return _result(torch.stack([inside + mean, stderr]), probes + paid)


def hutch_plus_plus(operator: Operator, *, products: int, seed: int) -> Trace:
    """A third of the products finds a basis that A maps most into, a third is spent on it, a third on the rest.

    The error falls as 1/products where the spectrum decays. The error bar comes from products / 3 probes: see
    `MIN_PROBES`. At least 6 products; what does not divide by 3 goes to the rest.
    """
    if products < 6:
        raise ValueError(f"expected at least 6 products for Hutch++, got {products}; use hutchinson.")
    rank, generator = min(products // 3, operator.size), _generator(seed)
    sketch_DK = torch.stack([operator.matvec(_signs(operator, generator)) for _ in range(rank)], 1)
    basis_KD = torch.linalg.qr(sketch_DK).Q.T
    inside = _inside(operator, basis_KD)
    mean, stderr = _mean_form(_outside(operator, basis_KD), operator, products - 2 * rank, generator)
    return _result(torch.stack([inside + mean, stderr]), products)


def xtrace(operator: Operator, *, products: int, seed: int) -> Trace:
    """Every test vector serves both purposes of Hutch++: it is a probe for the basis made of all the others.

    With M = products / 2 Gaussian vectors w_i and Q_i = orth(A w_j, j != i), the estimate is the mean over i of

        tr(Q_i' A Q_i) + (D - M + 1) v_i' A v_i / |v_i|^2,      v_i = (I - Q_i Q_i') w_i,

    with the normalisation of the paper's section 2.3, which needs Gaussian vectors: only for them is v_i / |v_i|
    uniform on the sphere outside of Q_i. Exact, with D products, where M would reach D.

    `stderr` is wider than the paper's s / sqrt(M), s^2 the sample variance of the M estimates: these share their test
    vectors and err together, so s^2 / M is too small by 2 (M - 1) / (M - 2) if pairs of vectors matter (it was by 1.8
    to 2.3). To that is added, in squares, a third of the mean of what leaving a vector out of the basis loses. From
    `MIN_XTRACE` = 32 products on three standard errors then cover the trace in 99 % of the draws, for flat and for
    decaying spectra. Not so where the spectrum drops to almost nothing after about M eigenvalues: all vectors may be
    nearly orthogonal to one of these at once, and no estimate sees it (coverage down to 86 %). The Hessian of a
    classifier drops like that after as many eigenvalues as there are classes; where M may be near, use
    `hutch_plus_plus`, whose last probes are new ones.
    """
    count, size = products // 2, operator.size
    if count < 3:
        raise ValueError(f"expected at least 6 products for XTrace, got {products}; use hutchinson.")
    if count >= size:
        units_DD = torch.eye(size, dtype=operator.dtype, device=operator.device)
        exact = _inside(operator, units_DD)
        return Trace(float(exact), 0.0, size)
    generator = _generator(seed)
    w_DM = torch.randn(count, size, generator=generator, dtype=operator.dtype).T.to(operator.device)
    aw_DM = _matmat(operator, w_DM)
    q_DM, r_MM = torch.linalg.qr(aw_DM)
    aq_DM = _matmat(operator, q_DM)
    h_MM = q_DM.T @ aq_DM
    s_MM = _left_out(r_MM)  # column i: the direction of Q's range that is lost without test vector i
    qw_MM = q_DM.T @ w_DM
    y_MM = qw_MM - s_MM * (s_MM * qw_MM).sum(0)
    v_DM, av_DM = w_DM - q_DM @ y_MM, aw_DM - aq_DM @ y_MM
    # A vector that lies in the basis of the others tells nothing of what is outside.
    form_M, least_M = (v_DM * av_DM).sum(0), torch.finfo(operator.dtype).eps * w_DM.square().sum(0)
    norm_sq_M = torch.maximum(v_DM.square().sum(0), least_M)
    lost_M = (s_MM * (h_MM @ s_MM)).sum(0)
    each_M = h_MM.trace() - lost_M + (size - count + 1) * form_M / norm_sq_M
    variance = 2 * (count - 1) / (count - 2) * each_M.var() / count + (lost_M.mean() / 3) ** 2
    return _result(torch.stack([each_M.mean(), variance.sqrt()]), 2 * count)


def _left_out(r_MM: Tensor) -> Tensor:
    """Unit columns s_i of R^-T: s_i is orthogonal to every column of R but the i-th. Singular R is regularised."""
    u, singular, vh = torch.linalg.svd(r_MM)
    top = torch.where(singular[0] > 0, singular[0], torch.ones_like(singular[0]))
    inverse_MM = u / singular.clamp_min(top * torch.finfo(r_MM.dtype).eps) @ vh
    unit_MM: Tensor = inverse_MM / inverse_MM.norm(dim=0)
    return unit_MM


def _mean_form(
    matvec: Callable[[Tensor], Tensor], operator: Operator, probes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mean of x'Bx over random signs x, and its standard error from the scatter of x * Bx."""
    mean_D, variance_D = _scatter(matvec, operator, probes, generator)
    return mean_D.sum(), torch.sqrt(2 * variance_D.sum())


def _scatter(
    matvec: Callable[[Tensor], Tensor], operator: Operator, probes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mean of x * Bx over random signs x, and the variance of that mean, both (D,), from running sums."""
    if probes < 2:
        raise ValueError(f"expected at least 2 probes, got {probes}; one alone has no standard error.")
    mean_D = torch.zeros(operator.size, dtype=operator.dtype, device=operator.device)
    squares_D = torch.zeros_like(mean_D)
    for n in range(1, probes + 1):
        x_D = _signs(operator, generator)
        d_D = x_D * matvec(x_D)
        change_D = d_D - mean_D
        mean_D = mean_D + change_D / n
        squares_D = squares_D.addcmul_(change_D, d_D - mean_D)
    return mean_D, squares_D / ((probes - 1) * probes)


def _outside(operator: Operator, basis_KD: Tensor) -> Callable[[Tensor], Tensor]:
    """The product with PAP, P the projection to the complement of the rows."""

    def project(v_D: Tensor) -> Tensor:
        return v_D - basis_KD.T @ (basis_KD @ v_D)

    return lambda v_D: project(operator.matvec(project(v_D)))


def _check_orthonormal(basis_KD: Tensor) -> None:
    gram_KK = basis_KD @ basis_KD.T
    worst = float((gram_KK - torch.eye(len(gram_KK)).to(gram_KK)).abs().max()) if len(gram_KK) else 0.0
    if not worst <= ORTHONORMAL:
        raise ValueError(
            f"expected orthonormal rows, got a Gram matrix that differs from the identity by {worst:.1e}; "
            "orthonormalise the basis (torch.linalg.qr), or the trace inside of it is wrong."
        )


def _matmat(operator: Operator, v_DM: Tensor) -> Tensor:
    return torch.stack([operator.matvec(v_D) for v_D in v_DM.T.contiguous()], 1)


def _generator(seed: int) -> torch.Generator:
    """On the host, so that the vectors depend on the seed and not on the device."""
    return torch.Generator().manual_seed(seed)


def _signs(operator: Operator, generator: torch.Generator) -> Tensor:
    bits_D = torch.randint(0, 2, (operator.size,), generator=generator, dtype=torch.int8)
    return (2 * bits_D - 1).to(operator.device, operator.dtype)


def _inside(operator: Operator, basis_KD: Tensor) -> Tensor:
    """sum of q'Aq over the rows, a product each."""
    total = torch.zeros((), dtype=operator.dtype, device=operator.device)
    for q_D in basis_KD:
        total = total + torch.dot(q_D, operator.matvec(q_D))
    return total


def _result(value_and_stderr: Tensor, products: int) -> Trace:
    value, stderr = value_and_stderr.tolist()
    return Trace(value, stderr, products)
