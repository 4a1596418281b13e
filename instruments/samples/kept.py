"""Per-example gradients of one batch kept as factors until a direction is known: the step that was taken with them.

Shapes: N = examples of one batch, D = trainable scalars.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from instruments.layout import Layout
from instruments.samples.factors import Factor
from instruments.samples.graph import Use

KEPT_BYTES = 2**26
"""Most that is kept, activations and their gradients; for more, a pass of its own costs less than the memory."""


@dataclass
class KeptFactors:
    """Filled by a pass of the fused engine: the factors of each parameter tensor, and what makes g_i of their products.

    `storages` are those of the parameters, which the step will write to: a factor may be a view of one. `losses_N` is
    the loss of each example, in a unit in which their mean is the loss.
    """

    storages: frozenset[int]
    factors: dict[int, tuple[Use | None, Factor]] = field(default_factory=dict)
    losses_N: Tensor | None = None
    unit: Tensor | float = 1.0
    bytes: int = 0

    @classmethod
    def of(cls, layout: Layout) -> "KeptFactors":
        """Empty."""
        return cls(frozenset(p.untyped_storage().data_ptr() for p in layout.params))

    def keep(self, index: int, use: Use | None, factor: Factor) -> None:
        """`use` is None for a factor in the shape of the parameter itself."""
        self.bytes += factor.bytes
        if self.bytes > KEPT_BYTES:
            self.factors.clear()
        else:
            self.factors[index] = use, factor.kept(self.storages)

    def clear(self) -> None:
        """For a pass that begins anew."""
        self.factors, self.bytes = {}, 0

    def complete(self, layout: Layout) -> bool:
        """Whether every parameter tensor is here."""
        return len(self.factors) == len(layout.params)

    def along(self, layout: Layout, directions: Sequence[Tensor]) -> Tensor:
        """(N,): <g_i, direction>, the direction in the shape of each parameter."""
        total_N: Tensor | None = None
        for index, direction in enumerate(directions):
            use, factor = self.factors[index]
            inner_N = factor.along(direction if use is None else use.from_parameter(direction)).to(layout.dtype)
            total_N = inner_N if total_N is None else total_N.add_(inner_N)
        assert total_N is not None
        return total_N * self.unit
