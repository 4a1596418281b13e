"""The probe batch: what curvature is read on, the same at every reading of a run.

A fresh mini-batch at every reading would mix the change of the model with the change of the data, and would throw away
what a warm start knows; the top Hessian eigenvalue of a small batch is also biased upwards. So the batches are given by
the user, or collected from the first ones seen, and then held.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from instruments.objective import Batch, bytes_of, clone_of, examples_of, moved, tensors_of

EXAMPLES = 512
BYTES = 256 * 2**20


def is_empty(batch: Batch) -> bool:
    """True for tensors of no examples; a batch in which no tensor can be seen is taken for one that has some."""
    return examples_of(batch) == 0 and any(t.ndim for t in tensors_of(batch))


class HeldBatches:
    """Whole batches, never sliced nor concatenated: up to 512 examples and 256 MiB unless the user gave them.

    While batches are still being collected a reading uses those seen so far; the number of examples stands in its
    provenance, and a change of it is a discontinuity of the curve.
    """

    def __init__(self, given: Iterable[Batch] | None = None) -> None:
        self.batches: list[Batch] = [] if given is None else list(given)
        if isinstance(given, tuple) and given and all(isinstance(part, Tensor) for part in given):
            raise ValueError(
                "expected probe=batches(b1, b2, ...), got a tuple of tensors, which looks like one batch; did you mean "
                "probe=batches((x, y))? As it stands each tensor would be a batch of its own."
            )
        if given is not None and all(map(is_empty, self.batches)):
            raise ValueError(
                "expected probe batches with at least one example, got none; pass probe=batches(b1, b2, ...) "
                "or leave it out to hold the first batches of training."
            )
        self.label = "held"
        self.complete = given is not None
        self.keep_graphs = True

    @property
    def examples(self) -> int:
        return sum(map(examples_of, self.batches))

    @property
    def extent(self) -> tuple[int, bool]:
        """How much is read: examples, and whether their graphs are kept between products."""
        return self.examples, self.keep_graphs

    def offer(self, batches: Sequence[Batch]) -> None:
        """Hold a copy of these batches if there is room; the first is held whatever its size."""
        for batch in batches:
            if self.complete:
                return
            if is_empty(batch):
                continue
            room = self.examples + examples_of(batch) <= EXAMPLES and self._bytes() + bytes_of(batch) <= BYTES
            if not self.batches or room:
                self.batches.append(clone_of(batch))
            # A batch whose size cannot be seen is held alone: nobody knows when there are enough of them.
            self.complete = not room or self.examples >= EXAMPLES or not examples_of(batch)

    def shrink(self) -> bool:
        """After running out of memory: stop keeping graphs, then drop half of the batches. False when none can go."""
        self.complete = True
        if self.keep_graphs:
            self.keep_graphs = False
            return True
        if len(self.batches) < 2:
            return False
        del self.batches[len(self.batches) // 2 :]
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"batches": list(self.batches), "complete": self.complete, "keep_graphs": self.keep_graphs}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """The batches of the checkpoint are held, on the model's device: a resumed run reads the same curve."""
        self.batches = [moved(batch, device) for batch in state["batches"]]
        self.complete, self.keep_graphs = state["complete"], state["keep_graphs"]

    def _bytes(self) -> int:
        return sum(map(bytes_of, self.batches))
