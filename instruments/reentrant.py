"""What hides in the graph of a loss: checkpoints whose parameters `torch.autograd.grad` does not see."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from instruments.refusal import Refusal


def nodes(loss: Tensor) -> Iterator[Any]:
    """Every node of the graph below a loss, once."""
    seen: set[Any] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting.extend(below for below, _ in node.next_functions)


def refuse_reentrant(loss: Tensor) -> None:
    """A reentrant checkpoint accumulates into `.grad` by a backward of its own: its parameters are not in the graph.

    Asked for their gradients, PyTorch says that they have none, where nothing before the checkpoint is trained.
    """
    if any(node.name() == "CheckpointFunctionBackward" for node in nodes(loss)):
        raise Refusal(
            "expected a graph that holds all parameters, got a reentrant checkpoint, which hides those inside it; "
            "pass use_reentrant=False to torch.utils.checkpoint. Otherwise their gradients would be read as zero."
        )
