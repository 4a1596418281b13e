"""How many directions the features of the last layer use.

Shapes: R = rows (examples and positions), W = width of the features, K = min(R, W).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch import Tensor, nn

from instruments.instrument import Gauge, Output, Values
from instruments.layout import Layout
from instruments.network._calls import Call, Calls
from instruments.refusal import Refusal
from instruments.view import Need, View


@dataclass(frozen=True)
class EffectiveRank(Gauge):
    """Effective and stable rank of the features that go into one layer, on at most `rows` rows.

    The features of the batch are a matrix A_RW with the singular values s_1 >= ... >= s_K, and with p = s / sum(s)

        effective rank = exp(-sum p_k log p_k),      stable rank = sum s_k^2 / s_1^2.

    Both lie between 1 and K = min(rows, width); the first counts directions, the second falls to 1 as soon as one of
    them dominates. A common mean of the features, which ReLU always makes, is such a direction: `centred` takes the
    mean row away first. Falling ranks go with the loss of plasticity and the collapse of features; a rank that falls to
    the number of classes in a classifier that fits its training set is neural collapse and no fault.

    Compare readings with the same `possible` only: with fewer rows than units the rank is bounded by the batch. `layer`
    is a name or a pattern (as of a shell) of the layer whose input is read, by default the `nn.Linear` called last; of
    several that match the one called last counts, over all its calls. Rows are all leading dimensions (examples,
    positions), taken at even distances where there are more than `rows`; channels of an input with four dimensions or
    more are its columns. Features that are not finite, or all zero, give NaN.
    """

    layer: str | None = None
    rows: int = 512
    centred: bool = False

    outputs: ClassVar[Mapping[str, Output]] = {
        "effective_rank": Output("directions", "exp of the entropy of the normalised singular values of the features"),
        "stable_rank": Output("directions", "squared Frobenius norm over squared spectral norm of the features"),
        "possible": Output("directions", "the largest rank there can be: rows or width, whichever is smaller"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"forward"})
    reference: ClassVar[str] = "Roy and Vetterli 2007, The effective rank, definition 1; Kumar et al. 2021 for features"

    def __post_init__(self) -> None:
        if self.rows < 2:
            raise ValueError(f"expected rows >= 2, got {self.rows}; one row has rank 1 whatever the features are.")

    def price(self, view: View) -> float:
        return 0.4

    def read(self, view: View) -> Values:
        found = view.forward(lambda: self._features(view.layout))
        if not found:
            wanted = "nn.Linear" if self.layer is None else f"layer that matches '{self.layer}' and takes features"
            raise Refusal(f"the forward calls no {wanted}; pass layer= with the name of the layer to look into.")
        name, pieces = found.popitem()
        a_RW = self._some(torch.cat(pieces)).double()
        view.meter.provenance.update(layer=name, rows=len(a_RW))
        effective, stable = ranks(a_RW - a_RW.mean(0) if self.centred else a_RW)
        return {"effective_rank": effective, "stable_rank": stable, "possible": float(min(a_RW.shape))}

    @contextmanager
    def _features(self, layout: Layout) -> Iterator[dict[str, list[Tensor]]]:
        """What goes into each of the layers that are looked into, in the order of their last calls."""
        found: dict[str, list[Tensor]] = {}

        def leave(call: Call, inputs: Sequence[Tensor], _outputs: Sequence[Tensor]) -> None:
            if self._wanted(call) and inputs and inputs[0].is_floating_point() and inputs[0].ndim >= 2:
                calls = found.pop(call.label, [])  # taken out and put back: the layer called last comes last
                found[call.label] = [*calls, self._some(_rows(inputs[0]))]

        with Calls(layout, leave=leave):
            yield found

    def _wanted(self, call: Call) -> bool:
        if self.layer is None:
            return isinstance(call.module, nn.Linear)
        return fnmatchcase(call.label, self.layer)

    def _some(self, a_RW: Tensor) -> Tensor:
        n = len(a_RW)
        if n <= self.rows:
            return a_RW
        return a_RW[torch.arange(self.rows, device=a_RW.device) * (n - 1) // (self.rows - 1)]


def _rows(x: Tensor) -> Tensor:
    """Features as the last dimension, everything else as rows; images have their channels second."""
    return (x.movedim(1, -1) if x.ndim >= 4 else x).flatten(0, -2)


def ranks(a_RW: Tensor) -> tuple[Tensor, Tensor]:
    """Effective and stable rank by the eigenvalues of the smaller Gram matrix; NaN for what is not finite."""
    gram_KK = a_RW @ a_RW.T if len(a_RW) < a_RW.shape[1] else a_RW.T @ a_RW
    if not gram_KK.isfinite().all():
        nan = gram_KK.new_tensor(float("nan"))
        return nan, nan
    squares_K = torch.linalg.eigvalsh(gram_KK).clamp(min=0)
    singular_K = squares_K.sqrt()
    entropy = torch.special.entr(singular_K / singular_K.sum()).sum()
    return entropy.exp(), squares_K.sum() / squares_K.max()
