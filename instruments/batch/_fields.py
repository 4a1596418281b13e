"""What of a batch is input and what is target."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from instruments.objective import Batch, tensors_of

TARGETS = ("labels", "label", "targets", "target", "y")


def targets_of(batch: Batch) -> Tensor | None:
    """The one tensor in the second of a pair, or in the entry of a mapping under one of `TARGETS`; None otherwise."""
    found = None
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in TARGETS if key in batch), None)
    elif isinstance(batch, Sequence) and len(batch) == 2:
        found = batch[1]
    tensors = tensors_of(found)
    return tensors[0] if len(tensors) == 1 else None


def inputs_of(batch: Batch) -> list[Tensor]:
    """All tensors apart from the second of a pair and the targets of a mapping."""
    if isinstance(batch, Mapping):
        return tensors_of({key: value for key, value in batch.items() if key not in TARGETS})
    return tensors_of(batch[0] if isinstance(batch, Sequence) and len(batch) == 2 else batch)
