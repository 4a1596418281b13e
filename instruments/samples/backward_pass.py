"""One backward pass that reads per-example gradients as it goes by."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from instruments.objective import Parts
from instruments.refusal import Refusal
from instruments.samples.exploration import Check, Plan
from instruments.samples.factors import Factor, Together, blocks
from instruments.samples.graph import Node, Use
from instruments.samples.problem import BatchMoments, SampleProblem, Statistics, flat_pieces, flat_rows
from instruments.samples.rules import factor

AGREE = {torch.float64: 1e-8, torch.float32: 1e-3}
COARSE = 5e-2  # of half precision
MEAN_AGREES = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Of the gradient of training with the mean of the g_i, relative to its size."""


class BackwardPass:
    """One backward pass with hooks on the operations that use parameters.

    `mean` is the gradient that training has computed, flat by parameter, where the pass is to stop early. Without it,
    and where inner products with the sum are wanted, a parameter waits until its operation has run and its own gradient
    is there.
    """

    def __init__(
        self,
        problem: SampleProblem,
        uses: Sequence[Use],
        plan: Plan,
        parts: Parts,
        checks: Sequence[Check],
        mean: Sequence[Tensor] | None,
    ) -> None:
        self._problem, self._parts, self._checks = problem, parts, checks
        self._by_parameter: dict[int, list[int]] = {}
        for number, use in enumerate(uses):
            self._by_parameter.setdefault(use.index, []).append(number)
        self._uses, self._plan, self._mean = uses, plan, mean
        self._factors: dict[int, Factor | None] = {}
        self._found: dict[int, Statistics] = {}
        self._sums: dict[int, Tensor] = {}
        self._sketches: list[tuple[int, Tensor, Tensor]] = []
        self._given = mean
        if problem.direction_D is not None:
            self._given = flat_pieces(problem.layout, problem.direction_D)
        self._waits = self._given is None and "inner_products" in problem.wants
        if problem.kept is not None:
            problem.kept.clear()
            problem.kept.unit = parts.examples / parts.denominator
            assert parts.sums_N is not None
            problem.kept.losses_N = (parts.sums_N * problem.kept.unit).detach()

    def run(self) -> tuple[Sequence[Tensor], dict[int, Statistics]]:
        """sum g_i over all parameters (their mean, where that is known), and the statistics of those parameters that
        could be read."""
        params, total = self._problem.layout.params, self._parts.total
        handles = self._hooks()
        try:
            if self._mean is None:
                grads = torch.autograd.grad(total, params, allow_unused=True)
            else:
                self._stop_early()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # tensors that may be looked at only once, such as those of a checkpoint
            raise Refusal(f"this graph cannot be read while it runs backward: {error}") from error
        finally:
            for handle in handles:
                handle.remove()
        if self._mean is not None:
            return self._mean, self._found
        with torch.no_grad():
            for index, p in enumerate(params):
                if index not in self._plan.elsewhere and index not in self._found:
                    self._finish(index, p, grads[index])
        return self._problem.layout.flat(grads), self._found

    def _hooks(self) -> list[Any]:
        handles = []
        for node, mine in self._numbers(range(len(self._uses))).items():
            handles.append(node.register_prehook(lambda grads, mine=mine: self._before(mine, grads[0])))
            if self._waits:
                handles.append(node.register_hook(lambda out, grads, mine=mine: self._after(mine, out)))
        return handles

    def _numbers(self, some: Iterable[int]) -> dict[Node, list[int]]:
        """Uses by their operation."""
        numbers: dict[Node, list[int]] = {}
        for number in some:
            if self._uses[number].index not in self._plan.elsewhere:
                numbers.setdefault(self._uses[number].node, []).append(number)
        return numbers

    def _stop_early(self) -> None:
        """The deepest operations are reached and not run: no hook of theirs is called."""
        last = self._numbers(self._plan.deepest)
        edges = [GradientEdge(node, 0) for node in last]
        deltas = torch.autograd.grad(self._parts.total, edges, allow_unused=True)
        with torch.no_grad():
            for mine, delta in zip(last.values(), deltas, strict=True):
                self._before(mine, delta)
            for number, made in self._factors.items():
                if made is not None:
                    self._read(self._uses[number], made)

    def _before(self, mine: Sequence[int], delta: Tensor | None) -> None:
        """The operation is about to run backward: what it saved is still there."""
        if delta is None:
            return
        for number in mine:
            use, axis = self._uses[number], self._plan.axes[number]
            assert axis is not None
            made = factor(use, axis, delta)
            now = not self._waits and (self._mean is None or not use.chain)
            if made is None or not now or len(self._by_parameter[use.index]) > 1:
                self._factors[number] = made
            else:
                self._read(use, made)

    def _seen(self, use: Use) -> Tensor:
        """The given direction as the operation sees it."""
        assert self._given is not None
        return use.from_parameter(self._given[use.index].view(self._problem.layout.params[use.index].shape))

    def _after(self, mine: Sequence[int], out: tuple[Tensor | None, ...]) -> None:
        """The gradient of the whole batch is there too: a parameter that is used once is done with."""
        for number in mine:
            use, made = self._uses[number], self._factors.get(number)
            if made is None or len(self._by_parameter[use.index]) > 1:
                continue
            whole = out[use.slot]
            if use.flipped and whole is not None:
                whole = whole.mT
            if whole is None or tuple(whole.shape) != use.shape or whole.layout is not torch.strided:
                whole = made.rows(slice(None)).sum(0)
            self._read(use, made, whole)
            del self._factors[number]

    def _read(self, use: Use, made: Factor, direction: Tensor | None = None) -> None:
        """All that is wanted of a parameter that is used once."""
        if direction is None and self._given is not None and "inner_products" in self._problem.wants:
            direction = self._seen(use)
        if self._problem.kept is not None:
            made = made.formed()
        found = made.statistics(self._problem.wants, direction)
        self._found[use.index] = use.statistics_to_parameter(found)
        if self._problem.kept is not None:
            self._problem.kept.keep(use.index, use, made)
        if self._checks:
            self._sums[use.index] = use.rows_to_parameter(self._weighted(made).view(len(self._checks), *use.shape))
        if self._mean is not None:
            whole = self._seen(use) if direction is None else direction
            sketch = made.sketch(whole) if found.sum_d is None else (found.sum_d, whole.reshape(-1).to(found.sum_d))
            if sketch is not None:
                self._sketches.append((use.index, *sketch))

    def of_factors(self, factors: Mapping[int, Factor]) -> BatchMoments | None:
        """Without a pass: what is to be read of each use is there. None where it is not of the gradient of training."""
        for number, made in factors.items():
            self._read(self._uses[number], made)
        return self.averaged()

    def averaged(self) -> BatchMoments | None:
        """The moments round the gradient of training, or None where that is not the mean of the g_i."""
        if self._mean is None or len(self._found) < len(self._problem.layout.params):
            return None
        ordered = [self._found[index] for index in range(len(self._found))]
        denominator = self._parts.denominator
        whole = BatchMoments.of(self._problem, ordered, self._mean, denominator, "fused", averaged=True)
        return whole if self._adds_up(whole.norms_sq_NL) else None

    def _adds_up(self, norms_sq_NL: Tensor) -> bool:
        """Whether what was taken for the mean of the g_i is their mean: random contractions of both agree, for every
        parameter, to what single examples leave of rounding."""
        if len(self._sketches) < len(self._problem.layout.params):
            return False
        sums, wholes = [total for _, total, _ in self._sketches], [whole for _, _, whole in self._sketches]
        n, denominator, dtype = len(norms_sq_NL), float(self._parts.denominator), norms_sq_NL.dtype
        errors = torch._foreach_norm(torch._foreach_add(sums, wholes, alpha=-denominator))
        norms = torch.stack([t.to(dtype) for t in (*errors, *torch._foreach_norm(wholes))]).double().cpu().numpy()
        errors_L, sizes_L = norms.reshape(2, -1)
        order = [index for index, _, _ in self._sketches]
        spread_L = np.sqrt(n * norms_sq_NL.double().sum(0).cpu().numpy()[order])
        allowed_L = MEAN_AGREES[dtype] * (denominator * sizes_L + 1e-3 * spread_L) + 1e-30
        return bool((errors_L <= allowed_L).all())

    def _finish(self, index: int, p: Tensor, grad: Tensor | None) -> None:
        """A parameter that is used several times, or not at all."""
        numbers = self._by_parameter.get(index, [])
        parts = [self._factors.pop(number, None) for number in numbers]
        present = [part for part in parts if part is not None]
        if len(present) < len(parts):
            return
        made = Together([self._uses[number] for number in numbers], present, self._parts.examples, p)
        direction = None
        if "inner_products" in self._problem.wants:
            whole = torch.zeros_like(p) if grad is None else grad.to_dense()
            direction = whole if self._given is None else self._given[index]
        self._found[index] = made.statistics(self._problem.wants, direction)
        if self._problem.kept is not None:
            self._problem.kept.keep(index, None, made)
        if self._checks:
            self._sums[index] = self._weighted(made)

    def _weighted(self, made: Factor) -> Tensor:
        """The sums of the checks, (checks, d), from a bounded number of gradients at a time."""
        weight_KN = torch.stack([check.weight_N for check in self._checks])
        each = made.rows(slice(0, 1))
        total = each.new_zeros(len(weight_KN), each.numel())
        for some in blocks(self._parts.examples, each.numel(), each):
            total += weight_KN[:, some].to(each.dtype) @ flat_rows(made.rows(some))
        return total

    def agreeing(self) -> frozenset[int]:
        """Parameters for which every check gives what its backward pass gave."""
        good = []
        for index, sums_Kd in self._sums.items():
            p = self._problem.layout.params[index]
            true = [check.grads[index] for check in self._checks]
            true_Kd = torch.stack([p.new_zeros(p.numel()) if g is None else _flat(g) for g in true]).to(sums_Kd)
            error_K, scale_K = (sums_Kd - true_Kd).norm(dim=1), true_Kd.norm(dim=1)
            allowed_K = AGREE.get(p.dtype, COARSE) * (scale_K + 1e-3 * scale_K.max()) + 1e-30
            if index in self._found and not bool((error_K > allowed_K).any()):
                good.append(index)
        return frozenset(good)


def _flat(g: Tensor) -> Tensor:
    return (g if g.layout is torch.strided else g.to_dense()).reshape(-1)
