"""What hides in the graph of a loss: functions whose parameters `torch.autograd.grad` does not see."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
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


REENTRANT = "CheckpointFunctionBackward"


def refuse_reentrant(loss: Tensor) -> None:
    """A reentrant checkpoint accumulates into `.grad` by a backward of its own: its parameters are not in the graph.

    Asked for their gradients, PyTorch says that they have none, where nothing before the checkpoint is trained.
    """
    if any(node.name() == REENTRANT for node in nodes(loss)):
        raise hidden_parameters()


def hidden_parameters() -> Refusal:
    """The refusal of a graph with a reentrant checkpoint."""
    return Refusal(
        "expected a graph that holds all parameters, got a reentrant checkpoint, which hides those inside it; "
        "pass use_reentrant=False to torch.utils.checkpoint. Otherwise their gradients would be read as zero."
    )


def gradients(total: Tensor, params: Sequence[Tensor], *, create_graph: bool = False) -> tuple[Tensor | None, ...]:
    """By each parameter, None where the graph does not reach it. Raises Refusal where it hides some."""
    refuse_reentrant(total)
    with nothing_hidden(params):
        return torch.autograd.grad(total, params, create_graph=create_graph, allow_unused=True)


@contextmanager
def nothing_hidden(params: Sequence[Tensor]) -> Iterator[None]:
    """Raises Refusal when a gradient taken inside writes to `.grad`.

    `torch.autograd.grad` does not; a function that runs a backward of its own does, and then those parameters are
    trained through `.grad` and look as if they were not used.
    """
    before = [(p.grad, None if p.grad is None else p.grad._version) for p in params]
    yield
    for p, (grad, version) in zip(params, before, strict=True):
        if p.grad is not grad or (grad is not None and grad._version != version):
            raise Refusal(
                "expected a graph that holds all parameters, got an autograd.Function that runs a backward of its own "
                "into `.grad` (a checkpoint of some library); use torch.utils.checkpoint with use_reentrant=False. "
                "Otherwise the derivatives of its parameters would be read as zero."
            )
