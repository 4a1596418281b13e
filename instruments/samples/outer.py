"""Per-example gradients of a weight that multiplies rows: a product of two thin matrices for each example.

Shapes: N = examples, n = some of them, T = positions of an example, G = groups, (p, q) = the weight of a group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from instruments.samples.factors import Factor, blocks, unit_normal
from instruments.samples.problem import Statistics, Wants, flat_rows


@dataclass(frozen=True)
class Outer(Factor):
    """g_i = a_i' b_i in each of G groups, (G, p, q), seen as `shape`."""

    a_NGTp: Tensor
    b_NGTq: Tensor
    shape: tuple[int, ...]

    def rows(self, some: slice) -> Tensor:
        g_nGpq = self.a_NGTp[some].mT @ self.b_NGTq[some]
        return g_nGpq.reshape(len(g_nGpq), *self.shape)

    def along(self, direction: Tensor) -> Tensor:
        n, groups, positions, p = self.a_NGTp.shape
        q = self.b_NGTq.shape[3]
        v_Gpq = direction.reshape(groups, p, q).to(self.a_NGTp.dtype)
        if groups == 1:  # plain matrices are multiplied faster than batches of them
            inner_R = _bilinear(self.a_NGTp.reshape(-1, p), v_Gpq[0], self.b_NGTq.reshape(-1, q))
            return inner_R.view(n, positions).sum(1)
        return ((self.a_NGTp @ v_Gpq) * self.b_NGTq).sum((1, 2, 3))

    def sketch(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        _, groups, _, p = self.a_NGTp.shape
        q = self.b_NGTq.shape[3]
        r_q = unit_normal(q, self.b_NGTq)
        w_Gpq = whole.reshape(groups, p, q).to(r_q.dtype)
        if groups == 1:
            return self.a_NGTp.reshape(-1, p).T @ (self.b_NGTq.reshape(-1, q) @ r_q), w_Gpq[0] @ r_q
        return torch.einsum("ngtp,ngt->gp", self.a_NGTp, self.b_NGTq @ r_q).reshape(-1), (w_Gpq @ r_q).reshape(-1)

    def statistics(self, wants: Wants, direction: Tensor | None) -> Statistics:
        _, groups, positions, p = self.a_NGTp.shape
        q = self.b_NGTq.shape[3]
        v_Gpq = None if direction is None else direction.reshape(groups, p, q).to(self.a_NGTp.dtype)
        if positions == 1:
            return self._rank_one(wants, v_Gpq)
        if v_Gpq is None and not wants and positions * (p + q) < p * q:
            return Statistics(((self.a_NGTp @ self.a_NGTp.mT) * (self.b_NGTq @ self.b_NGTq.mT)).sum((1, 2, 3)))
        return self._in_blocks(wants, v_Gpq)

    def _rank_one(self, wants: Wants, v_Gpq: Tensor | None) -> Statistics:
        """One position: |g|^2 = |a|^2 |b|^2, g^2 = a^2 b^2, <g, v> = a v b, <g_i, g_j> = <a_i, a_j> <b_i, b_j>."""
        groups = [
            _rank_one_of(wants, self.a_NGTp[:, g, 0], self.b_NGTq[:, g, 0], None if v_Gpq is None else v_Gpq[g])
            for g in range(self.a_NGTp.shape[1])
        ]  # plain matrices are multiplied faster than batches of one
        if len(groups) == 1:
            return groups[0]

        def stacked(name: str) -> Tensor | None:
            return None if getattr(groups[0], name) is None else torch.stack([getattr(group, name) for group in groups])

        norms, inner, gram = (stacked(name) for name in ("norms_sq_N", "inner_N", "gram_NN"))
        assert norms is not None
        return Statistics(
            norms.sum(0),
            stacked("squares_d"),
            None if inner is None else inner.sum(0),
            None if gram is None else gram.sum(0),
        )

    def _in_blocks(self, wants: Wants, v_Gpq: Tensor | None) -> Statistics:
        """All examples together, a bounded number of rows of the weight at a time."""
        n, groups, _, p = self.a_NGTp.shape
        q = self.b_NGTq.shape[3]
        norms_N = self.a_NGTp.new_zeros(n)
        inner_N = None if v_Gpq is None else torch.zeros_like(norms_N)
        gram_NN = self.a_NGTp.new_zeros(n, n) if "gram" in wants else None
        squares_Gpq = self.a_NGTp.new_zeros(groups, p, q) if "second_moment" in wants else None
        for rows in blocks(p, n * groups * q, self.a_NGTp):
            g_NGrq = self.a_NGTp[..., rows].mT @ self.b_NGTq
            g_Nd = flat_rows(g_NGrq)
            if inner_N is not None and v_Gpq is not None:
                inner_N += g_Nd @ v_Gpq[:, rows].reshape(-1)
            if gram_NN is not None:
                gram_NN += g_Nd @ g_Nd.T
            g_Nd.square_()
            norms_N += g_Nd.sum(1)
            if squares_Gpq is not None:
                squares_Gpq[:, rows] = g_NGrq.sum(0)
        return Statistics(norms_N, squares_Gpq, inner_N, gram_NN)


def _rank_one_of(wants: Wants, a_Np: Tensor, b_Nq: Tensor, v_pq: Tensor | None) -> Statistics:
    a2_Np, b2_Nq = a_Np.square(), b_Nq.square()
    return Statistics(
        a2_Np.sum(1).mul_(b2_Nq.sum(1)),
        a2_Np.T @ b2_Nq if "second_moment" in wants else None,
        None if v_pq is None else _bilinear(a_Np, v_pq, b_Nq),
        (a_Np @ a_Np.T).mul_(b_Nq @ b_Nq.T) if "gram" in wants else None,
    )


def _bilinear(a_Np: Tensor, v_pq: Tensor, b_Nq: Tensor) -> Tensor:
    """a_i' v b_i, from the shorter side."""
    if a_Np.shape[1] <= b_Nq.shape[1]:
        return (a_Np @ v_pq).mul_(b_Nq).sum(1)
    return (b_Nq @ v_pq.T).mul_(a_Np).sum(1)
