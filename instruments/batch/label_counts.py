"""How the labels of a batch compare with those seen so far.

Shapes: C = classes, n_c = labels of class c in the batch, m_c = the same in all batches read before.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from instruments.batch._fields import targets_of
from instruments.instrument import Instrument, Output, State, Values
from instruments.refusal import Refusal
from instruments.view import Need, View

MOST_BINS = 200


@dataclass(frozen=True)
class LabelCounts(Instrument):
    """Counts of the labels in the batch, and a chi-square test of them against the labels of all batches read before.

    With B labels in the batch, M before, and N = B + M, the batch is compared with what came before as two samples of
    one distribution over the C classes that have been seen (expected counts B (n_c + m_c) / N and M (n_c + m_c) / N):

        chi2 = sum_c (sqrt(M/B) n_c - sqrt(B/M) m_c)^2 / (n_c + m_c).

    For a long memory this is sum_c (n_c - B p_c)^2 / (B p_c) with the running shares p_c; unlike that sum it is defined
    for a class that appears for the first time, and it does not take a short memory for the truth. Shuffled data give
    `expected` = C - 1 on average; data sorted by class give about B times as much. `p_value` is the upper tail of the
    chi-square distribution: rough where classes are rarer than about five a batch; too large within an epoch without
    replacement and for balanced samplers; too small for labels that depend on each other, such as the tokens of a text.

    Labels are integers or booleans: the second of a pair, or the entry "labels", "targets" or "y" of a mapping.
    Negative ones (ignored, as -100) are left out. Only batches that were read are in the memory, which holds one count
    a class. More than 200 classes share 200 bins in `counts`.
    """

    most_classes: int = 1_000_000

    outputs: ClassVar[Mapping[str, Output]] = {
        "counts": Output("labels", "labels of the batch by class", "histogram"),
        "classes": Output("classes", "classes that the batch holds"),
        "majority": Output("1", "share of the most frequent class of the batch"),
        "chi2": Output("1", "distance of the batch's counts from those before; NaN for the first batch"),
        "expected": Output("1", "what chi2 is on average for shuffled data: classes seen less one"),
        "p_value": Output("1", "probability of a chi2 at least as large for shuffled data; NaN for the first batch"),
        "running_majority": Output("1", "share of the most frequent class so far: accuracy of a constant answer"),
        "running_entropy": Output("nat", "entropy of the labels so far: loss of the best constant answer"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"batch"})
    reference: ClassVar[str] = "Pearson 1900; for two samples Press et al., Numerical Recipes, eq. 14.3.3"

    def price(self, view: View) -> float:
        return 0.0

    def init(self) -> State:
        return {"counts": torch.zeros(0, dtype=torch.int64)}

    def advance(self, view: View, state: State) -> tuple[Values, State]:
        labels = self._labels(view)
        before_C = state["counts"].cpu()
        n_C = labels.bincount(minlength=len(before_C)).cpu()
        m_C = torch.nn.functional.pad(before_C, (0, len(n_C) - len(before_C)))
        chi2, freedom = homogeneity(n_C.double(), m_C.double())
        total_C = n_C + m_C
        share_C = total_C.double() / total_C.sum()
        half = torch.tensor([freedom / 2, chi2 / 2], dtype=torch.float64)
        values: Values = {
            "counts": _histogram(n_C),
            "classes": float((n_C > 0).sum()),
            "majority": n_C.max() / n_C.sum(),
            "chi2": chi2,
            "expected": float(freedom),
            "p_value": torch.special.gammaincc(half[0], half[1]) if freedom else float("nan"),
            "running_majority": share_C.max(),
            "running_entropy": torch.special.entr(share_C).sum(),
        }
        return values, {"counts": total_C}

    def _labels(self, view: View) -> Tensor:
        targets = [targets_of(batch) for batch in view.batches]
        found = [y for y in targets if y is not None and not y.is_floating_point() and not y.is_complex()]
        if len(found) < len(targets):
            raise Refusal(
                "expected integer labels, the second of a pair or an entry 'labels', 'targets' or 'y' of a mapping; "
                "got none, or numbers that are no classes."
            )
        labels = torch.cat([y.detach().flatten().long() for y in found])
        labels = labels[labels >= 0]
        if not len(labels):
            raise Refusal("the batch holds no label that counts: all are negative, which means ignored.")
        if int(labels.max()) >= self.most_classes:
            raise Refusal(
                f"expected labels below {self.most_classes:,}, got {int(labels.max()):,}: these are no classes; pass "
                "LabelCounts(most_classes=...) if they are. One count a class is kept."
            )
        return labels


def homogeneity(n_C: Tensor, m_C: Tensor) -> tuple[float, int]:
    """Chi-square of two samples' counts and its degrees of freedom; NaN when one of them is empty."""
    seen_C = n_C + m_C > 0
    n_C, m_C = n_C[seen_C], m_C[seen_C]
    ratio = (m_C.sum() / n_C.sum()).sqrt()
    chi2 = ((ratio * n_C - m_C / ratio).square() / (n_C + m_C)).sum()
    return float(chi2) if m_C.sum() else float("nan"), len(n_C) - 1


def _histogram(n_C: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Row 0 the last class of each bin, row 1 the labels in it."""
    width = -(-len(n_C) // MOST_BINS)
    bins = -(-len(n_C) // width)
    counts = torch.nn.functional.pad(n_C, (0, bins * width - len(n_C))).view(bins, width).sum(1)
    return np.stack([np.arange(1, bins + 1) * width - 1.0, counts.numpy().astype(np.float64)])
