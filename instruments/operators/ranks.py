"""A matrix whose batches lie on several processes: one of them reads it, the others lend their products.

With local matrices H_r of mean losses and what these weigh, w_r (examples, or tokens that count),

    H v = sum_r w_r H_r v / sum_r w_r,

the matrix of all the batches as one. The first process of the group leads: it alone runs the instrument and decides
when to stop. The others follow: they wait for a vector, multiply, and add to the sum, until they are told that the
reading is over. So no two processes can disagree about how many products there are. A follower that fails says so in
the sum; the leader then refuses, and everybody comes out.

Shapes: D = trainable scalars.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, distributed

from instruments.operators.operator import Operator
from instruments.refusal import Refusal

Matrix = Literal["hessian", "gauss_newton"]
SUMMED: tuple[Matrix, ...] = ("hessian", "gauss_newton")
"""Matrices of mean losses: the only ones that add up with the weights of their batches."""
PATIENCE = timedelta(seconds=60)
"""How long to wait at the beginning for processes that do not come, where the backend can tell (gloo)."""
DONE, PRODUCT, GRADIENT = 0, 1, 2


class Weighted(Protocol):
    """A local matrix: products, the gradient of the same loss, and what the loss weighs once one was computed."""

    size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def weight(self) -> Tensor | float: ...
    @property
    def price(self) -> float: ...
    @property
    def route(self) -> str: ...
    @property
    def gradient_D(self) -> Tensor: ...
    def matvec(self, v_D: Tensor) -> Tensor: ...


Locals = Callable[[Matrix], Weighted]
"""The matrix of this process's own batches, made when first asked for."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a group (None: all), in one reading. `examples` counts those of all of them."""

    group: Any = None
    examples: int = 0

    @property
    def count(self) -> int:
        return int(distributed.get_world_size(self.group))

    @property
    def leads(self) -> bool:
        return bool(distributed.get_rank(self.group) == 0)

    @property
    def _leader(self) -> int:
        return 0 if self.group is None else int(distributed.get_global_rank(self.group, 0))

    def meet(self, about: Mapping[str, Any], examples: int) -> "Ranks":
        """Everybody is here and wants the same: the same group, with its examples counted. Raises Refusal if not.

        With gloo a process that does not come within `PATIENCE` is named; other backends wait for the time limit that
        the group was made with.
        """
        if distributed.get_rank(self.group) < 0:
            raise Refusal("expected a process of the group, got one outside of it; only its members may call.")
        if distributed.get_backend(self.group) == "gloo":
            try:
                distributed.monitored_barrier(self.group, timeout=PATIENCE, wait_all_ranks=True)
            except RuntimeError as error:
                raise Refusal(
                    "expected every process of the group to ask for this reading at this step, got some that did not "
                    f"come: {str(error).strip().splitlines()[0]}"
                ) from error
        said: list[Any] = [None] * self.count
        distributed.all_gather_object(said, (dict(about), examples), group=self.group)
        for rank, (other, _) in enumerate(said):
            first = said[0][0]
            different = [
                f"{name} {first[name]} on 0 and {other[name]} on {rank}" for name in about if other[name] != first[name]
            ]
            if different:
                raise Refusal(f"expected the same reading on every process, got {'; '.join(different)}.")
        return Ranks(self.group, sum(n for _, n in said))

    def share(self, result: Any) -> Any:
        """What the leader gives, on all of them."""
        box = [result]
        distributed.broadcast_object_list(box, src=self._leader, group=self.group)
        return box[0]

    def order(self, what: int, which: int, device: torch.device) -> tuple[int, int]:
        """The leader's word, on all of them."""
        word = torch.tensor([what, which], device=device)
        distributed.broadcast(word, src=self._leader, group=self.group)
        what, which = word.tolist()
        return what, which

    def hand_out(self, v_D: Tensor) -> None:
        """The leader's vector, into everybody's."""
        distributed.broadcast(v_D, src=self._leader, group=self.group)

    def add_up(self, share_D: Tensor, weight: Tensor | float) -> Tensor:
        """Weighted mean over the processes, (D,), on the leader. Raises Refusal there when one of them failed."""
        heavy = torch.as_tensor(weight).to(share_D)
        sum_D = self._reduced(share_D * heavy, heavy, 0.0)
        if self.leads and sum_D[-1] > 0:
            raise Refusal(
                f"{int(sum_D[-1])} of {self.count} processes could not compute its share; their logs say why."
            )
        mean_D: Tensor = sum_D[:-2] / sum_D[-2]
        return mean_D

    def give_nothing(self, zeros_D: Tensor) -> None:
        """Take part in the sum, and say that this process failed."""
        self._reduced(zeros_D, torch.zeros_like(zeros_D[0]), 1.0)

    def _reduced(self, share_D: Tensor, weight: Tensor, failed: float) -> Tensor:
        sum_D = torch.cat([share_D, weight.reshape(1), share_D.new_tensor([failed])])
        distributed.reduce(sum_D, dst=self._leader, group=self.group)
        return sum_D


class RankSum(Operator):
    """The leader's side: `local` summed over the processes, all of which `follow` meanwhile."""

    def __init__(self, local: Weighted, matrix: Matrix, ranks: Ranks) -> None:
        self._local, self._which, self._ranks = local, SUMMED.index(matrix), ranks
        self.size, self.dtype, self.device = local.size, local.dtype, local.device

    @property
    def price(self) -> float:  # type: ignore[override]
        return self._local.price

    @property
    def route(self) -> str:  # type: ignore[override]
        return f"{self._local.route}, summed over {self._ranks.count} processes"

    @property
    def error(self) -> float | None:
        """That of the leader's own products."""
        return getattr(self._local, "error", None)

    @property
    def gradient_D(self) -> Tensor:
        """Gradient of the same loss, shape (D,)."""
        self._ranks.order(GRADIENT, self._which, self.device)
        return self._sum(lambda: self._local.gradient_D)

    def matvec(self, v_D: Tensor) -> Tensor:
        v_D = v_D.contiguous()
        self._ranks.order(PRODUCT, self._which, self.device)
        self._ranks.hand_out(v_D)
        return self._sum(lambda: self._local.matvec(v_D))

    def _sum(self, compute: Callable[[], Tensor]) -> Tensor:
        try:
            share_D, weight = compute(), self._local.weight
        except Exception:
            self._ranks.give_nothing(torch.zeros(self.size, dtype=self.dtype, device=self.device))
            raise
        return self._ranks.add_up(share_D, weight)


def follow(local: Locals, ranks: Ranks, zeros_D: Tensor) -> Exception | None:
    """The other side: serve the leader until it is done. Returns what went wrong here first, if anything did.

    `zeros_D` is a vector as the leader's are.
    """
    failure: Exception | None = None
    made: dict[int, Weighted] = {}
    while True:
        what, which = ranks.order(DONE, 0, zeros_D.device)
        if what == DONE:
            return failure
        v_D = zeros_D.clone()
        if what == PRODUCT:
            ranks.hand_out(v_D)
        try:
            if which not in made:
                made[which] = local(SUMMED[which])
            share_D = made[which].matvec(v_D) if what == PRODUCT else made[which].gradient_D
        except Exception as error:
            failure = failure or error
            ranks.give_nothing(zeros_D)
        else:
            ranks.add_up(share_D, made[which].weight)
