"""What the layers give on the step's batch, by one more forward without gradients.

Shapes: N = examples of the step.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from instruments.probe import Probe

OUTPUT = ""
"""The key of the model's own output among the activations."""

Activations = Mapping[str, list[Tensor]]
"""Outputs by the name of the layer, a list because a layer may be called several times and the step may have several
micro-batches; under `OUTPUT` what the model itself gives."""


def run_forward(probe: "Probe", around: AbstractContextManager[Any]) -> None:
    """One forward of the step's batches through model and loss inside `around`, under the step's own masks."""
    with torch.no_grad(), probe.running(held=False, differentiable=True), around:
        for batch in probe.batches:
            probe.objective.parts(probe.module, batch)


def read_activations(probe: "Probe") -> Activations:
    """The tensors that every layer without layers inside gave, and the output of the model."""
    seen: dict[str, list[Tensor]] = {}
    run_forward(probe, _recording(probe.module, seen))
    return seen


@contextmanager
def _recording(model: nn.Module, seen: dict[str, list[Tensor]]) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():
        if name == OUTPUT or not any(True for _ in module.children()):

            def keep(_module: nn.Module, _inputs: Any, output: Any, name: str = name) -> None:
                found = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
                # A copy: what follows may write into it (ReLU(inplace=True), a residual connection by +=).
                seen.setdefault(name, []).extend(leaf.detach().clone() for leaf in found[:1])

            handles.append(module.register_forward_hook(keep))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
